"""`export-model --latents EXPORT`: the scaling of a finished export in the model's config.json."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.__main__ import main
from pipeline.common.errors import UserError
from pipeline.export.model import export_model
from pipeline.latents import LatentDataset
from pipeline.models.interchange import from_pretrained, read_description
from tests.export.world import make_config, make_data, make_run, run_export

MODEL = {"bottleneck": {"kind": "gaussian", "size": 2}}


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `run`, the finished export `out` by its raw weights, and an unfinished one."""
    folder = tmp_path_factory.mktemp("latents")
    run = make_run(folder / "run", make_data(folder / "data", shards=2), MODEL)
    run_export(make_config(run, folder / "out", weights="raw"))
    shutil.copytree(folder / "out", folder / "unfinished")
    (folder / "unfinished" / "_SUCCESS").unlink()
    return folder


def test_the_scaling_of_exported_latents_stands_in_the_config(
    latents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "out"
    argv = ["export-model", latents / "run", out, "--weights", "raw", "--latents", latents / "out"]
    assert main(list(map(str, argv))) == 0
    capsys.readouterr()
    statistics = json.loads((latents / "out" / "latent_stats.json").read_text())
    written, read = json.loads((out / "config.json").read_text()), read_description(out)
    for name in ("latents_mean", "latents_std", "scaling_factor", "shift_factor"):
        assert written[name] == statistics[name]
    assert list(read.latents_mean or ()) == statistics["latents_mean"]
    assert list(read.latents_std or ()) == statistics["latents_std"]
    assert read.scaling_factor == statistics["scaling_factor"] is not None
    assert read.shift_factor == statistics["shift_factor"] is not None
    dataset = LatentDataset(latents / "out")  # what the scaling is for
    channels = (dataset[:].mu - np.array(read.latents_mean)) / np.array(read.latents_std)
    np.testing.assert_allclose(
        channels, LatentDataset(latents / "out", normalized=True)[:].mu, 1e-4, 1e-5
    )


def test_a_model_without_scaling_has_the_file_it_always_had(latents: Path, tmp_path: Path):
    """Released models lack what describes latents: written as before, they are read as before."""
    out = tmp_path / "out"
    export_model(latents / "run", out)
    former = {
        "format",
        "model",
        "event_shape",
        "latent_shape",
        "stored",
        "decode",
        "precision",
        "weights",
        "weights_sha256",
        "encoder_sha256",
        "step",
        "samples_seen",
        "dataset_id",
        "order_id",
        "versions",
    }
    assert set(json.loads((out / "config.json").read_text())) == former
    read = read_description(out)
    assert (read.scaling_factor, read.shift_factor, read.networks) == (None, None, None)
    assert (read.latents_mean, read.latents_std) == (None, None)
    from_pretrained(out)


@pytest.mark.parametrize(
    ("place", "options", "message"),
    [
        ("out", {"weights": "ema"}, "holds latents of another model: its weights_sha256 is "),
        ("out", {"weights": "raw", "step": 1}, "Give the --step and --weights that encoded them"),
        ("unfinished", {"weights": "raw"}, "holds an unfinished export: _SUCCESS is not there"),
        ("data", {"weights": "raw"}, "holds no export: manifest.json is not there"),
    ],
)
def test_latents_that_do_not_fit_are_refused(
    latents: Path, tmp_path: Path, place: str, options: Any, message: str
):
    with pytest.raises(UserError, match=message) as raised:
        export_model(latents / "run", tmp_path / "out", latents=str(latents / place), **options)
    assert str(latents / place) in str(raised.value)
    assert list(tmp_path.iterdir()) == []
