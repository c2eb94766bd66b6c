"""Weights that a run starts from, and parameters that it does not train."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pipeline.checkpoints.folder import list_checkpoints, read_state
from pipeline.common import strict
from pipeline.common.errors import UserError
from pipeline.config import TrainConfig
from pipeline.evaluation.trained import evaluate_run
from pipeline.export.model import export_model
from pipeline.export.verify.reencode import verify_with_run
from pipeline.losses.players import freeze
from pipeline.models.autoencoder import AutoEncoder
from pipeline.train import train
from pipeline.training.build import build_trained
from pipeline.training.describe import describe
from pipeline.training.loading import load_run
from tests.activations import kept_bytes
from tests.config.runs import BASE, records
from tests.export.world import make_config, run_export, tree

CHANGED = {
    "model": BASE["model"] | {"likelihood": {"kind": "squared_error"}},
    "ema_decay": 0.5,  # so that averaged weights differ from raw ones
    "optimizer": {"learning_rate": {"peak": 0.01, "final": 0.01}, "weight_decay": 0.1},
}
Start = Callable[..., Path]


def config_of(run_dir: Path, data: Path, *overrides: str) -> TrainConfig:
    settings = [f"run_dir={run_dir}", f"data.path={data}", *overrides]
    return strict.load(TrainConfig, None, settings, text=json.dumps(BASE | CHANGED))


@pytest.fixture(scope="module")
def source(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps."""
    run = tmp_path_factory.mktemp("source") / "run"
    assert train(config_of(run, tiny_shards)) == 0
    return run


@pytest.fixture
def start(tiny_shards: Path, tmp_path: Path) -> Start:
    """Train from weights; return the run directory."""

    def run(init_from: Path | None, *overrides: str, accept: tuple[str, ...] = ()) -> Path:
        settings = () if init_from is None else (f"init_from={init_from}",)
        config = config_of(tmp_path / "run", tiny_shards, *settings, *overrides)
        assert train(config, accept_changes=accept) == 0
        return tmp_path / "run"

    return run


def saved(run: Path, step: int, name: str = "model") -> dict[str, Tensor]:
    found = load_file(run / "checkpoints" / f"step-{step}" / f"{name}.safetensors")
    return {name: value.clone() for name, value in found.items()}  # not mapped: it may be damaged


def origin(run: Path) -> dict[str, str] | None:
    return read_state(list_checkpoints(run / "checkpoints")[0]).init_from


def check_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_a_run_starts_from_the_averaged_weights_of_another(
    source: Path, start: Start, capsys: pytest.CaptureFixture[str]
):
    run, loaded = start(source, "num_steps=1"), load_run(source)
    expected = loaded.model.state_dict()
    check_equal(saved(run, 0), expected)
    check_equal(saved(run, 0, "ema"), expected)
    assert saved(run, 0, "optimizer") == {}
    assert origin(run) == {"kind": "run", "sha256": loaded.weights_sha256}
    line = f"starts from {source}: run at step 4, averaged weights, sha256 {loaded.weights_sha256}"
    assert capsys.readouterr().err.count(line) == 1
    # What it measures first is what the other measured last: data, order and noise are the same.
    first, last = records(run)[0], evaluate_run(source).figures
    assert first["step"] == 0
    assert first["eval/loss"] == first["eval_ema/loss"] == last["eval_ema/loss"]
    assert first["eval/loss"] != last["eval/loss"]


def test_seed_and_order_stay_those_of_a_run_from_random_weights(
    source: Path, start: Start, tmp_path: Path
):
    run = start(source, "num_steps=2")
    began, alone = records(run)[1], records(source)[1]
    assert began["step"] == alone["step"] == 1
    assert began["data/order_digest"] == alone["data/order_digest"]
    assert began["train/loss"] != alone["train/loss"]
    state = (source / "checkpoints" / "step-4" / "state.json").read_text()
    assert "init_from" not in state  # as all runs had it


def test_weights_as_trained_where_there_is_no_average(
    source: Path, start: Start, tmp_path: Path, tiny_shards: Path, capsys
):
    plain = tmp_path / "plain"
    assert train(config_of(plain, tiny_shards, "ema_decay=null")) == 0
    run = start(plain, "num_steps=1")
    assert "run at step 4, weights as trained, sha256 " in capsys.readouterr().err
    check_equal(saved(run, 0), saved(plain, 4))


def test_a_models_folder_and_a_file_of_it(source: Path, start: Start, tmp_path: Path):
    folder = tmp_path / "folder"
    digest = export_model(source, folder).weights_sha256
    for path, kind in ((folder, "folder"), (folder / "model.safetensors", "file")):
        run = start(path, "num_steps=1")
        assert origin(run) == {"kind": kind, "sha256": digest}
        check_equal(saved(run, 0), load_run(source).model.state_dict())
        shutil.rmtree(run)


def test_no_later_start_reads_it(source: Path, start: Start, tmp_path: Path):
    """Not even one that was killed before it saved a step."""
    copy = Path(shutil.copytree(source, tmp_path / "copy"))
    settings = ("checkpoint.every_steps=1", "checkpoint.keep.latest=9")
    run = start(copy, "num_steps=2", *settings)
    shutil.rmtree(copy)
    whole, began = saved(run, 2), origin(run)
    start(copy, "num_steps=3", *settings)
    assert origin(run) == began
    for step in (1, 2, 3):
        shutil.rmtree(run / "checkpoints" / f"step-{step}")
    start(copy, "num_steps=2", *settings)
    check_equal(saved(run, 2), whole)
    assert origin(run) == began


def test_a_run_whose_checkpoints_are_all_damaged_reads_it_again(
    source: Path, start: Start, capsys: pytest.CaptureFixture[str]
):
    run = start(source, "num_steps=1")
    whole = saved(run, 1)
    for path in list_checkpoints(run / "checkpoints"):
        (path / "model.safetensors").write_bytes(b"")
    capsys.readouterr()
    start(source, "num_steps=1")
    assert f"starts from {source}: " in capsys.readouterr().err
    check_equal(saved(run, 1), whole)


def test_a_likelihood_that_the_source_has_not_begins_as_ever(
    source: Path, start: Start, capsys: pytest.CaptureFixture[str]
):
    run = start(source, "num_steps=1", "model.likelihood={kind: gaussian, sigma: learned}")
    told = "; not there, so left as initialised: likelihood.raw_log_sigma\n"
    assert told in capsys.readouterr().err
    found = saved(run, 0)
    sigma = found.pop("likelihood.raw_log_sigma")
    assert torch.equal(sigma, build(sigma="learned").state_dict()["likelihood.raw_log_sigma"])
    check_equal(found, load_run(source).model.state_dict())


def test_a_setting_that_changes_what_the_weights_mean_is_told(
    source: Path, start: Start, capsys: pytest.CaptureFixture[str]
):
    start(source, "num_steps=1", "model.bottleneck.logvar=clamp")
    told = f"warning: init_from {source} was trained with other settings: "
    told += "model.bottleneck.logvar is 'tanh' there, 'clamp' here\n"
    assert told in capsys.readouterr().err


def build(*patterns: str, sigma: object = 0.1, checkpointing: bool = False) -> AutoEncoder:
    """The small model, with what matches the patterns frozen."""
    settings = BASE | {
        "run_dir": "unused",
        "data": BASE["data"] | {"path": "unused"},
        "model": BASE["model"]
        | {
            "likelihood": {"kind": "gaussian", "sigma": sigma},
            "gradient_checkpointing": checkpointing,
        },
        "freeze": list(patterns),
    }
    model = build_trained(TrainConfig.model_validate_json(json.dumps(settings)))
    assert isinstance(model, AutoEncoder)
    return model


def frozen(model: torch.nn.Module) -> set[str]:
    return {name for name, value in model.named_parameters() if not value.requires_grad}


def test_patterns_name_parameters_as_a_checkpoint_does():
    everything = {name for name, _ in build().named_parameters()}
    assert frozen(build()) == set()
    encoder = {name for name in everything if name.startswith("encoder.")}
    assert frozen(build("encoder.*")) == encoder
    assert frozen(build("encoder.1.bias")) == {"encoder.1.bias"}
    both = frozen(build("encoder.?.weight", "likelihood.*", sigma="learned"))
    assert both == {"encoder.1.weight", "encoder.3.weight", "likelihood.raw_log_sigma"}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_frozen_half_costs_no_backward(checkpointing: bool):
    x, shape = torch.rand(4, 3, 8, 8), (4, 2)
    model = build("encoder.*", checkpointing=checkpointing)
    assert model(x, mode="encode").z.grad_fn is None
    if not checkpointing:  # which saves the inputs of stages until they end
        assert kept_bytes(lambda: model(x, mode="encode")) == 0
    loss = model(x).decoded.sum()
    loss.backward()
    assert all((p.grad is None) == n.startswith("encoder.") for n, p in model.named_parameters())
    # With a frozen decoder the gradient passes through it to the encoder.
    model = build("decoder.*", checkpointing=checkpointing)
    model(x).decoded.sum().backward()
    assert all((p.grad is None) == n.startswith("decoder.") for n, p in model.named_parameters())
    assert model(torch.zeros(shape), mode="decode").decoded.grad_fn is None


def test_what_is_frozen_has_no_moments_and_no_average_and_may_be_thawed(source: Path, start: Start):
    """Decay moves nothing of it; averaged weights are complete; a thawed parameter moves."""
    before = load_run(source).model.state_dict()
    run = start(source, "num_steps=3", "freeze=[encoder.*]")
    for weights in ("raw", "ema"):
        after = load_run(run, weights=weights).model.state_dict()
        assert after.keys() == before.keys()
        for name, value in after.items():
            assert torch.equal(value, before[name]) == name.startswith("encoder."), name
    trained = {name for name in before if not name.startswith("encoder.")}
    assert saved(run, 3, "ema").keys() == trained
    assert {name.partition(".")[2] for name in saved(run, 3, "optimizer")} == trained

    with pytest.raises(UserError, match=r"freeze\.0: there 'encoder\.\*', now"):
        start(source, "num_steps=5")
    accept = ("freeze",)
    start(source, "num_steps=5", accept=accept)
    assert saved(run, 5, "ema").keys() == before.keys()
    for name in before:
        assert not torch.equal(saved(run, 5)[name], before[name]), name
    # Thawed and stopped, it goes on with the same bits.
    whole = saved(run, 5)
    shutil.rmtree(run / "checkpoints" / "step-5")
    start(source, "num_steps=4", accept=("num_steps",))
    start(source, "num_steps=5")
    check_equal(saved(run, 5), whole)


def test_latents_of_the_frozen_encoder_stay_valid_for_the_new_decoder(
    source: Path, start: Start, tmp_path: Path
):
    """An export before: verified, continued and used for the scaling of the new model."""
    out = tmp_path / "latents"
    assert run_export(make_config(source, out)) == 0
    before = tree(out)
    run = start(source, "num_steps=3", "freeze=[encoder.*]", "ema_decay=null")
    report = verify_with_run(str(out), str(run), source=None, shards=None, num_tasks=9)
    assert report.problems == []
    assert report.notes[-1].endswith("60 of them bit for bit")
    export_model(run, tmp_path / "model", weights="raw", latents=str(out))
    described = json.loads((tmp_path / "model" / "config.json").read_text())
    assert described["scaling_factor"] > 0
    # Some of its tasks were lost, and the new run makes them again.
    for path in (out / "_SUCCESS", out / "manifest.json"):
        path.unlink()
    lost = sorted((out / "_run").rglob("*tiny-0003*"))
    assert lost
    for path in lost:
        path.unlink()
    assert run_export(make_config(run, out, weights="raw")) == 0
    assert tree(out) == before

    shutil.rmtree(run)
    start(None, "num_steps=3")
    report = verify_with_run(str(out), str(run), source=None, shards=None, num_tasks=1)
    assert report.problems[0].startswith("model.encoder_sha256: the export has '")
    assert "has no checkpoint of step 4: compared with its newest" in report.notes[-1]


def test_a_dry_run_checks_both(source: Path, tmp_path: Path, tiny_shards: Path):
    config = config_of(tmp_path / "run", tiny_shards, f"init_from={source}", "freeze=[encoder.*]")
    text = describe(config)
    frozen = sum(p.numel() for p in load_run(source).model.encoder.parameters())
    assert f"# frozen parameters: {frozen:,}\n" in text
    assert f"# starts from {source}: run at step 4, averaged weights, sha256 " in text
    assert not (tmp_path / "run").exists()
    for wrong in ("init_from=nowhere", "freeze=[encodr.*]"):
        with pytest.raises(UserError):
            describe(config_of(tmp_path / "run", tiny_shards, wrong))


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (("init_from={tmp}/nowhere",), ("init_from: {tmp}/nowhere does not exist",)),
        (("init_from={tmp}/empty",), ("init_from: {tmp}/empty/diffusion_pytorch_model.safe",)),
        (("init_from={tmp}/weights.ckpt",), ("init_from: {tmp}/weights.ckpt is a pickle",)),
        (
            ("init_from={source}", "model.bottleneck.size=3"),
            (
                "init_from: {source}/checkpoints/step-4 does not hold the weights of this model",
                "3 of another shape (",
                "decoder.0.weight [6, 2] instead of [6, 3]",
                "Settings that differ: model.bottleneck.size is 2 there, 3 here.",
            ),
        ),
        (
            ("init_from={source}", "model.backbone.hidden=[6, 6]", "data.decode.channels=1"),
            (
                "4 missing (",
                "model.backbone.hidden.1 is ",
                "data.decode.channels is 3 there, 1 here",
            ),
        ),
        (
            ("freeze=[encoder.*, decodr.*]",),
            ("freeze: 'decodr.*' matches no parameter; the nearest are decoder.*, ",),
        ),
        (
            ("freeze=['*']",),
            ("freeze: [*] leaves no parameter of the autoencoder to train: name fewer.",),
        ),
    ],
    ids=lambda value: value[-1].partition("=")[0] + value[-1][-9:],
)
def test_bad_input_is_told_before_anything_is_written(
    source: Path,
    tmp_path: Path,
    tiny_shards: Path,
    overrides: tuple[str, ...],
    told: tuple[str, ...],
):
    (tmp_path / "weights.ckpt").write_bytes(b"\x80\x02}q\x00.")
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.rglob("*"))
    places = {"tmp": tmp_path, "source": source}
    config = config_of(tmp_path / "run", tiny_shards, *(o.format(**places) for o in overrides))
    with pytest.raises(UserError) as error:
        train(config)
    for text in told:
        assert text.format(**places) in str(error.value)
    assert "\n" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_discriminator_may_be_frozen_but_the_autoencoder_not_as_a_whole():
    players = torch.nn.ModuleDict({"autoencoder": build(), "discriminator": torch.nn.Linear(2, 2)})
    freeze(players, ["discriminator.*"])
    assert frozen(players) == {"discriminator.weight", "discriminator.bias"}
    with pytest.raises(UserError, match="leaves no parameter of the autoencoder"):
        freeze(players, ["encoder.*", "decoder.*"])
