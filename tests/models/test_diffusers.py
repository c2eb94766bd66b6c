"""Diffusers' autoencoders, written and read: their classes compute what our model computes."""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.export.model import export_model
from pipeline.latents import LatentDataset
from pipeline.models.autoencoder import AutoEncoder, ModelConfig
from pipeline.models.backbones.resnet import PRESETS
from pipeline.models.interchange import read_description, read_weights
from pipeline.models.interchange.diffusers import read_config
from pipeline.models.interchange.importing import import_model
from pipeline.models.interchange.writing import save_diffusers
from tests.export.world import make_config, make_data, make_run, run_export
from tests.models.foreign import MINI, WEIGHTS, as_ldm, as_old, make_model

pytestmark = pytest.mark.slow

TOLERANCE = 1e-5
# An eighth of every width.
REDUCED: dict[str, Any] = {
    name: {"widths": [max(width // 8, 8) for width in preset["widths"]], "groups": 8}
    for name, preset in PRESETS.items()
} | {"resnet-mini": {}}


@pytest.fixture(scope="session")
def diffusers() -> Any:
    """The package, whose import takes seconds."""
    return import_module("diffusers")


def assert_close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=TOLERANCE, atol=TOLERANCE)


@torch.no_grad()
def assert_same_function(theirs: Any, ours: AutoEncoder, height: int, width: int) -> None:
    x = torch.rand(2, 3, height, width, generator=torch.manual_seed(height))
    code = ours(x, mode="encode").posterior
    encoded = theirs.encode(2 * x - 1)
    if code.logvar is None:
        assert_close(code.mu, encoded.latents)
    else:
        assert_close(code.mu, encoded.latent_dist.mean)
        assert_close(code.logvar, encoded.latent_dist.logvar)
    assert_close(ours(code.mu, mode="decode").decoded, (theirs.decode(code.mu).sample + 1) / 2)


@pytest.mark.parametrize("preset", [*PRESETS, "sd, in full", "tiny"])
def test_their_class_opens_what_we_write_and_computes_the_same(
    diffusers: Any, preset: str, tmp_path: Path
):
    name = preset.removesuffix(", in full")
    if preset == "tiny":
        ours = make_model({"kind": "tiny"}, size=16, kind="deterministic")
    else:
        ours = make_model(
            {"kind": "resnet", "preset": name, **(REDUCED[name] if name == preset else {})}
        )
    save_diffusers(tmp_path / "ours", ours, scaling={})
    kind = {"tiny": "AutoencoderTiny", "flux2": "AutoencoderKLFlux2"}.get(name, "AutoencoderKL")
    theirs = getattr(diffusers, kind).from_pretrained(tmp_path / "ours").eval()
    for height, width in ((32, 32), (32, 48)):
        assert_same_function(theirs, ours, height, width)
    # And back, from what their class writes.
    theirs.save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        config, _ = read_config(tmp_path / folder / "config.json")
        assert nameless(config.model()) == nameless(ours.config)
        weights = read_weights(tmp_path / folder, ours)
        assert weights.keys() == ours.state_dict().keys()
        for key, value in ours.state_dict().items():
            assert torch.equal(weights[key], value), key


def nameless(model: ModelConfig) -> Any:
    return {**model.model_dump(), "backbone": {**model.backbone.model_dump(), "preset": None}}


def test_their_converter_and_ours_read_the_same_of_a_file_of_latent_diffusion(
    diffusers: Any, tmp_path: Path
):
    ours = make_model(MINI)
    save_diffusers(tmp_path / "ours", ours, scaling={})
    tensors = load_file(tmp_path / "ours" / WEIGHTS)
    convert = import_module("diffusers.loaders.single_file_utils").convert_ldm_vae_checkpoint
    theirs = convert(as_ldm(tensors), json.loads((tmp_path / "ours" / "config.json").read_text()))
    assert theirs.keys() == tensors.keys()  # that `as_ldm` is right
    for name, value in theirs.items():
        assert torch.equal(value, tensors[name])


def test_old_names_are_those_that_their_class_takes(diffusers: Any, tmp_path: Path):
    ours = make_model(MINI)
    save_diffusers(tmp_path / "old", ours, scaling={})
    save_file(
        as_old(load_file(tmp_path / "old" / WEIGHTS)),
        tmp_path / "old" / WEIGHTS,
        metadata={"format": "pt"},
    )
    theirs = diffusers.AutoencoderKL.from_pretrained(tmp_path / "old")
    assert_same_function(theirs, ours, 32, 32)
    for key, value in read_weights(tmp_path / "old", ours).items():
        assert torch.equal(ours.state_dict()[key], value), key


def test_the_scaling_of_flux2_is_its_normalisation_of_patches(diffusers: Any, tmp_path: Path):
    model = {
        "backbone": {"kind": "resnet", "preset": "flux2", "widths": [8, 8], "groups": 4},
        "bottleneck": {"size": 3, "kind": "gaussian"},
    }
    data = make_data(tmp_path / "data", shards=2)
    run = make_run(tmp_path / "run", data, model)
    run_export(make_config(run, tmp_path / "latents", weights="raw"))
    report = export_model(
        run, tmp_path / "out", weights="raw", latents=str(tmp_path / "latents"), format="diffusers"
    )
    assert report.notes == (
        "means are equal; large log-variances differ: diffusers clamps, not tanh",
    )
    theirs = diffusers.AutoencoderKLFlux2.from_pretrained(tmp_path / "out")
    rows = LatentDataset(tmp_path / "latents")[:]
    mu = torch.from_numpy(rows.mu[rows.valid]).double()
    pipeline = diffusers.Flux2Pipeline
    patches = pipeline._patchify_latents(mu)
    sigma2 = pipeline._patchify_latents(torch.from_numpy(rows.logvar[rows.valid]).double().exp())
    assert len(mu) == 32
    assert_close(theirs.bn.running_mean.double(), patches.mean((0, 2, 3)))
    variance = patches.var((0, 2, 3), correction=0) + sigma2.mean((0, 2, 3))
    assert_close(theirs.bn.running_var.double(), variance)
    # Imported again, these are the export's own statistics by channel.
    import_model(tmp_path / "out", tmp_path / "again")
    statistics, read = (
        LatentDataset(tmp_path / "latents").statistics,
        read_description(tmp_path / "again"),
    )
    assert read.latents_mean == pytest.approx(statistics["latents_mean"], rel=1e-4, abs=1e-6)
    assert read.latents_std == pytest.approx(statistics["latents_std"], rel=1e-4)
    assert read.model.backbone.model_dump()["preset"] == "flux2"
