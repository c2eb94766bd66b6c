"""Encoders: a model gives the same bytes from its run and from its exported folder."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from pipeline.checkpoints.folder import read_state, read_tensors, save_checkpoint
from pipeline.common import strict
from pipeline.common.errors import UserError
from pipeline.export.command import begin
from pipeline.export.model import export_model
from pipeline.export.settings import ExportConfig
from pipeline.export.verify.reencode import verify_with_run
from pipeline.export.workers import Worker
from pipeline.latents import LatentDataset
from pipeline.models.autoencoder import ModelConfig, build_autoencoder, encoder_sha256
from tests.export.world import NUM_SHARDS, SHARD_ROWS, make_config, run_export, tree


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, run_dir: Path) -> Path:
    """The run's model, exported to a folder."""
    out = tmp_path_factory.mktemp("folder") / "model"
    export_model(run_dir, out)
    return out


def config_of(folder: Path, out: Path, **settings: object) -> ExportConfig:
    model = {"kind": "folder", "path": str(folder)}
    return make_config(Path("unused"), out, **{"run": None, "model": model} | settings)


def test_an_exported_model_gives_the_bytes_of_its_run(
    data: Path, folder: Path, run_dir: Path, finished: Path, tmp_path: Path
):
    out = tmp_path / "out"
    assert run_export(config_of(folder, out, data={"path": str(data)})) == 0
    assert tree(out) == tree(finished)
    same = {"kind": "run", "path": str(run_dir), "step": 2}
    assert run_export(config_of(folder, tmp_path / "run", model=same)) == 0
    assert tree(tmp_path / "run") == tree(finished)
    for model in (folder, run_dir):
        report = verify_with_run(str(out), str(model), source=str(data), shards=None, num_tasks=1)
        assert report.problems == []
        assert f"{SHARD_ROWS} of them bit for bit" in report.notes[-1]


def test_a_trained_on_decoder_leaves_the_latents_valid(
    run_dir: Path, finished: Path, data: Path, tmp_path: Path
):
    """The encoder's digest is the same, so latents, plans and scaling fit the new decoder."""
    later = Path(shutil.copytree(run_dir, tmp_path / "later"))
    path = later / "checkpoints" / "step-2"
    tensors = read_tensors(path)
    for state in (tensors.model, tensors.ema):
        assert state is not None
        for name, value in state.items():
            if name.startswith("decoder."):
                value += torch.randn(value.shape)
    state = read_state(path)
    shutil.rmtree(path)
    save_checkpoint(later / "checkpoints", state, tensors)

    report = verify_with_run(str(finished), str(later), source=None, shards=None, num_tasks=1)
    assert report.problems == []
    export_model(later, tmp_path / "model", latents=str(finished))
    described = json.loads((tmp_path / "model" / "config.json").read_text())
    with LatentDataset(finished) as dataset:
        model = dataset.manifest.values["fingerprint"]["model"]
    assert described["encoder_sha256"] == model["encoder_sha256"]
    assert described["weights_sha256"] != model["weights_sha256"]
    assert described["scaling_factor"] > 0
    for name in ("encoder_sha256", "weights_sha256"):
        with LatentDataset(finished, weights_sha256=model[name]) as dataset:
            assert len(dataset) == NUM_SHARDS * SHARD_ROWS
    with LatentDataset(finished, weights_sha256=described["encoder_sha256"]):
        pass
    with pytest.raises(UserError, match="holds latents of another model"):
        LatentDataset(finished, weights_sha256=described["weights_sha256"])


def test_the_encoders_digest_is_of_weights_and_settings():
    def digest(*, seed: int = 0, **bottleneck: object) -> str:
        config = ModelConfig.model_validate(
            {"backbone": {"kind": "mlp", "hidden": (8,)}, "bottleneck": bottleneck}
        )
        return encoder_sha256(build_autoencoder(config, (4,), seed=seed, dtype=torch.float32))

    gaussian = {"kind": "gaussian", "size": 2}
    assert digest(**gaussian) == digest(**gaussian)
    assert digest(**gaussian) != digest(**gaussian, seed=1)
    # The same tensors, taken as moments or as the latent itself.
    assert digest(**gaussian) != digest(kind="deterministic", size=4)


@pytest.mark.parametrize(
    ("backbone", "bottleneck", "digest"),
    [
        (
            {"kind": "burgess"},
            {"kind": "gaussian"},
            "d41eea2f809e0797c172e1ae8c3e7a0e1ceefc14c14afca330086c6cfd02e60a",
        ),
        (
            {"kind": "burgess"},
            {"kind": "deterministic", "size": 4},
            "4e043a90169226d278afe75155a51b1ff99fbb014da1c9baad059a6467cca93a",
        ),
        (
            {"kind": "mlp", "hidden": (8,)},
            {"kind": "gaussian", "size": 2},
            "4fb08f7127db1c8456fd41d01f5c4acec3c4600652656b339b03314d504e6ef5",
        ),
    ],
)
def test_digests_of_encoders_stay_what_they_were(
    backbone: dict[str, object], bottleneck: dict[str, object], digest: str
):
    """Plans, manifests and exported models hold them."""
    config = ModelConfig.model_validate({"backbone": backbone, "bottleneck": bottleneck})
    shape = (1, 32, 32) if backbone["kind"] == "burgess" else (4,)
    model = build_autoencoder(config, shape, seed=0, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    assert encoder_sha256(model) == digest


def test_a_setting_that_came_after_a_plan_means_its_default(
    run_dir: Path, finished: Path, tmp_path: Path
):
    out = Path(shutil.copytree(finished, tmp_path / "out"))
    plan = json.loads((out / "_run" / "plan.json").read_bytes())
    likelihood = plan["fingerprint"]["model"]["architecture"]["likelihood"]
    assert likelihood.pop("link", None) or likelihood.pop("sigma", None)
    (out / "_run" / "plan.json").write_text(json.dumps(plan))
    (out / "_SUCCESS").unlink()
    begin(make_config(run_dir, out), Worker())  # refused, if absent were another than the default


def test_a_config_is_what_its_dump_says(folder: Path, tmp_path: Path):
    config = config_of(folder, tmp_path / "out")
    assert strict.load(ExportConfig, None, [], text=strict.dump(config)) == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"run": "r"}, "name the model either by run or by model, but both are given"),
        ({"model": None}, "name the model either by run or by model, but neither is given"),
        ({"step": 1}, "step and weights belong to run: give them inside model"),
    ],
)
def test_a_model_is_named_once(tmp_path: Path, settings: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        config_of(tmp_path, tmp_path / "out", **settings)


def test_what_is_no_model_and_a_model_without_data_are_refused(folder: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"is a model without a data set: name .* by data\.path"):
        run_export(config_of(folder, tmp_path / "out"))
    with pytest.raises(UserError, match="is no exported model: it has no config"):
        run_export(config_of(tmp_path, tmp_path / "out", data={"path": "d"}))
    assert not (tmp_path / "out").exists()
