"""Training in this process: the four variants, their files, golden losses and ends."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.checkpoints.folder import list_checkpoints
from pipeline.common import strict
from pipeline.config import TrainConfig
from pipeline.data.index import Index
from pipeline.evaluation.request import EvaluationRequest
from pipeline.evaluation.trained import evaluate_run
from pipeline.train import main
from pipeline.training.loading import load_run
from tests.processes import ROOT
from tests.shards import tiny_image

VARIANTS = ("ae", "dae", "vae", "beta_vae")
NUM_STEPS = 60
GOLDEN = ROOT / "tests" / "golden" / "losses.json"
GOLDEN_STEPS, GOLDEN_RTOL = 10, 1e-3
EVERY = {"log": 1, "evaluate": 30, "save": 30}


def command(variant, run_dir, shards, **settings):
    """The arguments of a small run of configs/train/<variant>.yaml on the tiny shards."""
    tree = {
        "run_dir": run_dir,
        "data.path": shards,
        "data.decode": "{kind: image, size: 32, channels: 3}",
        "batch_size": 16,
        "num_steps": NUM_STEPS,
        "optimizer.learning_rate.warmup_samples": 160,
        "monitor.wandb.mode": "disabled",
        "monitor.log_every_steps": EVERY["log"],
        "evaluation.every_steps": EVERY["evaluate"],
        "checkpoint.every_steps": EVERY["save"],
    }
    path = ROOT / "configs" / "train" / f"{variant}.yaml"
    return [str(path), *(f"{name}={value}" for name, value in (tree | settings).items())]


def records(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def series(run_dir, name):
    """The values of one metric, by step."""
    return {record["step"]: record[name] for record in records(run_dir) if name in record}


def outcome(run_dir):
    return json.loads((run_dir / "outcome.json").read_text())


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_shards):
    """The run directory of each variant, trained when first asked for."""
    made = {}

    def run(variant):
        if variant not in made:
            run_dir = tmp_path_factory.mktemp("runs") / variant
            assert main(command(variant, run_dir, tiny_shards)) == 0
            made[variant] = run_dir
        return made[variant]

    return run


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_loss_falls_on_training_and_on_held_out_images(runs, variant):
    losses = list(series(runs(variant), "train/loss").values())
    assert len(losses) == NUM_STEPS
    assert all(math.isfinite(loss) for loss in losses)
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10])
    for prefix in ("eval", "eval_ema"):
        evaluated = series(runs(variant), f"{prefix}/loss")
        assert list(evaluated) == [0, 30, 60]
        assert evaluated[60] < evaluated[30] < evaluated[0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_golden_losses(runs, variant, request):
    found = list(series(runs(variant), "train/loss").values())[:GOLDEN_STEPS]
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if request.config.getoption("--update-golden"):
        golden[variant] = found
        GOLDEN.write_text(json.dumps(golden, indent=1, sort_keys=True) + "\n")
    assert variant in golden, f"{GOLDEN} lacks {variant}: create it with --update-golden"
    assert found == pytest.approx(golden[variant], rel=GOLDEN_RTOL)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_run_directory_holds_what_it_promises(runs, variant, tiny_shards):
    run_dir = runs(variant)
    names = {path.name for path in run_dir.iterdir()}
    assert names == {
        "config.yaml",
        "metrics.jsonl",
        "checkpoints",
        "images",
        "evaluations",
        "outcome.json",
        "locations.json",
        "lock",
    }
    assert outcome(run_dir) == {"status": "done", "exit_code": 0, "step": 60, "message": ""}
    config = strict.load(TrainConfig, run_dir / "config.yaml", [])
    path, *overrides = command(variant, run_dir, tiny_shards)
    assert config == strict.load(TrainConfig, Path(path), overrides).resolved()
    checkpoints = list_checkpoints(run_dir / "checkpoints")
    assert [path.name for path in checkpoints] == ["step-60", "step-30"]
    pictures = sorted(path.name for path in (run_dir / "images").iterdir())
    steps = (0, 30, 60)
    names = {f"{view}-{step:08d}" for view in ("eval", "eval_ema") for step in steps}
    expected = {f"{name}.{kind}" for name in names for kind in ("json", "png")}
    assert {*pictures} == expected | {f"best_worst-{name}.png" for name in names}
    grid = np.asarray(Image.open(run_dir / "images" / "eval-00000000.png"))
    assert grid.shape == (8 * 32, 4 * 32, 3)
    last = records(run_dir)[-1]
    assert last["data/samples_seen"] == 60 * 16
    count = sum(Index.open(tiny_shards).counts("train"))
    assert last["data/epoch"] == pytest.approx(60 * 16 / count)
    assert (last["data/tombstones"], last["optim/skipped_steps"]) == (0, 0)
    assert last["optim/grad_norm"] > 0


def test_every_variant_reports_the_terms_of_its_objective(runs):
    for variant in VARIANTS:
        first = records(runs(variant))[1]  # after the evaluation of step 0
        assert first["step"] == 1
        total = first["train/distortion"]
        if variant in ("vae", "beta_vae"):
            total += first["optim/weight_kl"] * first["train/kl"]
        else:
            assert "train/kl" not in first
            assert first["train/distortion"] == pytest.approx(
                first["train/squared_error"], rel=1e-6
            )
        assert first["train/loss"] == pytest.approx(total, rel=1e-6)
    assert set(series(runs("vae"), "optim/weight_kl").values()) == {1.0}
    weights = series(runs("beta_vae"), "optim/weight_kl")
    assert weights == pytest.approx({step: 4 * (step - 1) * 16 / 20000 for step in weights})


def test_the_target_of_a_denoising_autoencoder_is_the_clean_image(tiny_shards, runs):
    grid = np.asarray(Image.open(runs("dae") / "images" / "eval-00000060.png")).astype(int)
    clean, corrupted, reconstruction, error = grid.reshape(8, 32, 4, 32, 3).transpose(2, 0, 1, 3, 4)
    known = [tiny_image(number) for number in range(60)]
    assert all(any(np.array_equal(image, other) for other in known) for image in clean)
    assert np.abs(corrupted - clean).mean() > 5
    shown = (reconstruction > 0) & (reconstruction < 255)  # a mean beyond [0, 1] is not
    assert shown.mean() > 0.5
    assert np.abs(error - np.abs(clean - reconstruction))[shown].max() <= 1
    # Equal initial weights and clean targets: only the encoder's input differs.
    plain = series(runs("ae"), "eval/squared_error")
    noisy = series(runs("dae"), "eval/squared_error")
    assert noisy[0] == pytest.approx(plain[0], rel=0.01)


def test_evaluate_gives_the_numbers_that_training_logged(runs):
    card = evaluate_run(runs("beta_vae"))
    assert card.step == 60
    metrics = dict(card.figures)
    record = records(runs("beta_vae"))[-2]  # of the last step, before its training values
    logged = {name: value for name, value in record.items() if name not in ("step", "time")}
    assert {name.split("/")[0] for name in metrics} == {"eval", "eval_ema"}
    assert metrics == pytest.approx(logged, rel=1e-6)
    assert metrics["eval/loss"] != metrics["eval_ema/loss"]
    earlier = evaluate_run(runs("beta_vae"), step=30).figures
    assert earlier["eval/loss"] == pytest.approx(
        series(runs("beta_vae"), "eval/loss")[30], rel=1e-6
    )
    on_train = evaluate_run(runs("beta_vae"), request=EvaluationRequest(split="train")).figures
    assert on_train["eval/samples"] + metrics["eval/samples"] == 60


def test_the_same_command_after_the_end_does_nothing_more(tmp_path, tiny_shards):
    arguments = command("ae", tmp_path / "run", tiny_shards, num_steps=12)
    assert main(arguments) == 0
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    weights = load_run(tmp_path / "run").weights_sha256
    assert main(arguments) == 0
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    assert load_run(tmp_path / "run").weights_sha256 == weights
    assert outcome(tmp_path / "run")["status"] == "done"


def test_the_memory_format_changes_no_loss(tmp_path, tiny_shards):
    losses = {}
    for channels_last in ("true", "false"):
        run_dir = tmp_path / channels_last
        settings = {"channels_last": channels_last, "num_steps": 10}
        assert main(command("vae", run_dir, tiny_shards, **settings)) == 0
        losses[channels_last] = list(series(run_dir, "train/loss").values())
    assert losses["true"] == pytest.approx(losses["false"], rel=1e-4)


# torch's own import of its compiler.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.slow
def test_a_compiled_model_trains_to_the_same_losses(tmp_path, tiny_shards):
    losses = {}
    for compiled in ("true", "false"):
        run_dir = tmp_path / compiled
        # A small network: compiling the convolutions takes minutes.
        settings = {"compile": compiled, "model.backbone": "{kind: mlp, hidden: [8]}"}
        assert main(command("vae", run_dir, tiny_shards, num_steps=20, **settings)) == 0
        losses[compiled] = list(series(run_dir, "train/loss").values())
        losses[compiled] += list(series(run_dir, "eval_ema/loss").values())
    assert len(losses["true"]) == 20 + 2
    assert losses["true"] == pytest.approx(losses["false"], rel=1e-3)


EXPLODING = {"optimizer.learning_rate": "{peak: 1e30}", "optimizer.max_grad_norm": "null"}


def test_a_run_that_explodes_fails_once_it_skipped_too_much(tmp_path, tiny_shards):
    settings = EXPLODING | {"max_skipped_steps": 5, "model.backbone": "{kind: mlp, hidden: [8]}"}
    run_dir = tmp_path / "run"
    with pytest.raises(RuntimeError, match="6 updates were skipped .* max_skipped_steps 5"):
        main(command("ae", run_dir, tiny_shards, **settings))
    skipped = series(run_dir, "optim/skipped_steps")
    assert list(skipped.values())[-1] == 6
    assert sorted(skipped.values()) == list(skipped.values())
    ended = outcome(run_dir)
    assert (ended["status"], ended["exit_code"]) == ("failed", 1)
    assert "6 updates were skipped" in ended["message"]
    norms = series(run_dir, "optim/grad_norm")
    assert math.isnan(norms[max(norms)])  # visible in the log


def test_skipped_steps_within_the_limit_leave_finite_weights(tmp_path, tiny_shards):
    settings = EXPLODING | {"max_skipped_steps": 100, "model.backbone": "{kind: mlp, hidden: [8]}"}
    assert main(command("ae", tmp_path / "run", tiny_shards, num_steps=20, **settings)) == 0
    skipped = list(series(tmp_path / "run", "optim/skipped_steps").values())[-1]
    assert 0 < skipped < 20
    for weights in ("raw", "ema"):
        state = load_run(tmp_path / "run", weights=weights).model.state_dict()
        assert all(torch.isfinite(value).all() for value in state.values())
    [newest, *_] = list_checkpoints(tmp_path / "run" / "checkpoints")
    state = json.loads((newest / "state.json").read_text())
    assert (state["step"], state["num_updates"]) == (20, 20 - skipped)


def test_another_config_in_the_same_directory_is_refused(tmp_path, tiny_shards, capsys):
    run_dir = tmp_path / "run"
    assert (
        main(
            command(
                "ae",
                run_dir,
                tiny_shards,
                num_steps=2,
                seed=1,
                **{"optimizer.learning_rate.warmup_samples": 0},
            )
        )
        == 0
    )
    before = (run_dir / "config.yaml").read_bytes()
    changed = command(
        "ae",
        run_dir,
        tiny_shards,
        num_steps=2,
        seed=2,
        **{"optimizer.learning_rate.warmup_samples": 0},
    )
    assert main(changed) == 2
    assert "seed: there 1, now 2" in capsys.readouterr().err
    assert (run_dir / "config.yaml").read_bytes() == before
