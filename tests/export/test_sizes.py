"""A convolutional model, whose latents are maps: exports at its own size, and at others."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import latentmill as lm
from pipeline.common import strict
from pipeline.common.errors import UserError
from pipeline.data.decode import ImageDecode
from pipeline.evaluation.exported import probe_export
from pipeline.export.model import export_model
from pipeline.export.status import export_status
from pipeline.export.verify.reencode import verify_with_run
from pipeline.latents import LatentDataset
from pipeline.models.autoencoder import build_autoencoder
from pipeline.models.interchange import read_description
from pipeline.training.loading import load_run
from tests.export import world
from tests.export.world import NUM_SHARDS, SHARD_ROWS, make_config, run_export, source_keys, tree
from tests.shards import pictures_of

pytestmark = pytest.mark.slow

MODEL = {"backbone": {"kind": "resnet", "preset": "resnet-mini"}}
FORMATS = [{"kind": kind} for kind in ("parquet", "tar", "npy", "safetensors")]
WIDE = (24, 40)  # height, width
BATCH = 6


@pytest.fixture(scope="module")
def spatial(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A run of a convolutional model, on pictures of 32 x 32."""
    return world.make_run(tmp_path_factory.mktemp("spatial"), data, MODEL)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, spatial: Path) -> Path:
    """Its model as a folder."""
    export_model(spatial, out := tmp_path_factory.mktemp("folder") / "model")
    return out


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory, spatial: Path) -> Path:
    """Its export at another size, mirrored as well, in every format."""
    out = tmp_path_factory.mktemp("wide") / "out"
    views = ["identity", "hflip"]
    config = make_config(spatial, out, size=WIDE, views=views, formats=FORMATS, batch_size=BATCH)
    assert run_export(config) == 0
    return out


def pictures_at(data: Path, decode: ImageDecode) -> torch.Tensor:
    """All pictures of the data set in order, decoded one by one, in [0, 1]."""
    slots = np.zeros((NUM_SHARDS * SHARD_ROWS, *decode.buffer_shape), np.uint8)
    index = 0
    for path in sorted(data.glob("*.tar")):
        for content in pictures_of(path):
            decode.decode(content, slots[index])
            index += 1
    assert index == len(slots)
    return decode.to_unit(decode.event_view(torch.from_numpy(slots)))


def moments_at(run: Path, x: torch.Tensor) -> dict[str, np.ndarray]:
    """The moments of a model that is built for this size, in the batches of an export."""
    trained = load_run(run)
    built = build_autoencoder(trained.config.model, x.shape[1:], seed=3, dtype=torch.float32)
    built.load_state_dict(trained.model.state_dict())
    parts: list[dict[str, torch.Tensor]] = []
    with torch.inference_mode():
        for shard in x.split(SHARD_ROWS):
            for batch in shard.split(BATCH):
                padding = torch.zeros(BATCH - len(batch), *batch.shape[1:])
                moments = built.eval()(torch.cat([batch, padding]), mode="encode").code.moments()
                parts.append({name: value[: len(batch)] for name, value in moments.items()})
    return {name: torch.cat([part[name] for part in parts]).numpy() for name in parts[0]}


def test_latents_are_those_of_a_model_that_is_built_for_the_size(
    spatial: Path, wide: Path, data: Path
):
    x = pictures_at(data, ImageDecode(size=WIDE, channels=1))
    expected = moments_at(spatial, x)
    mirrored = moments_at(spatial, x.flip(-1))
    for kind in ("parquet", "tar", "npy", "safetensors"):
        ds = LatentDataset(wide, format=kind)
        assert (ds.latent_shape, list(ds[:].keys)) == ((4, 6, 10), source_keys(data))
        assert ds[:].valid.all()
        for name in ("mu", "logvar"):
            found = ds[:].latents
            np.testing.assert_allclose(found[name], expected[name], atol=1e-4)  # kernels
            np.testing.assert_allclose(found[f"{name}_hflip"], mirrored[name], atol=1e-4)  # kernels
    # The mirrored picture's map is not the mirrored map: the network saw it.
    assert np.abs(expected["mu"] - mirrored["mu"][..., ::-1]).max() > 1e-3


def test_statistics_are_per_channel(wide: Path):
    ds = LatentDataset(wide)
    mu, logvar = (ds[:].latents[name].astype(np.float64) for name in ("mu", "logvar"))
    statistics = ds.statistics
    np.testing.assert_allclose(statistics["latents_mean"], mu.mean((0, 2, 3)), rtol=1e-9)
    variance = mu.var((0, 2, 3)) + np.exp(logvar).mean((0, 2, 3))
    np.testing.assert_allclose(statistics["latents_std"], np.sqrt(variance), rtol=1e-9)
    assert np.shape(statistics["mu"]["covariance"]) == (4, 4)
    assert statistics["num_values_per_channel"] == NUM_SHARDS * SHARD_ROWS * 6 * 10
    assert statistics["active_units"]["count"] <= 4


def test_a_folder_gives_the_bytes_of_its_run(model: Path, wide: Path, data: Path, tmp_path: Path):
    named = {"run": None, "model": {"kind": "folder", "path": str(model)}}
    settings = {"views": ["identity", "hflip"], "formats": FORMATS, "batch_size": BATCH}
    config = make_config(
        Path("unused"), tmp_path / "out", size=WIDE, data={"path": str(data)}, **named, **settings
    )
    assert run_export(config) == 0
    assert tree(tmp_path / "out") == tree(wide)


def test_an_export_of_another_size_resumes_is_listed_and_verifies(
    spatial: Path, model: Path, wide: Path, data: Path, tmp_path: Path
):
    out = Path(shutil.copytree(wide, tmp_path / "out"))
    again = {"views": ["identity", "hflip"], "formats": FORMATS, "batch_size": BATCH}
    assert run_export(make_config(spatial, out, size=WIDE, **again)) == 0
    assert tree(out) == tree(wide)
    assert export_status(str(out)).finished
    with pytest.raises(UserError, match=r"data.decode.size: there \[24, 40\], now 32"):
        run_export(make_config(spatial, out, **again))
    for source in (spatial, model):
        report = verify_with_run(str(wide), str(source), source=str(data), shards=None, num_tasks=1)
        assert report.problems == []
        assert f"{SHARD_ROWS} of them bit for bit" in report.notes[-1]


def test_the_scaling_of_such_an_export_is_the_models(spatial: Path, wide: Path, tmp_path: Path):
    export_model(spatial, tmp_path / "scaled", latents=str(wide))
    description = read_description(tmp_path / "scaled")
    assert list(description.latents_mean or ()) == LatentDataset(wide).statistics["latents_mean"]
    assert description.latent_shape == (4, 8, 8)  # of the model's own pictures


def test_the_models_own_size_may_be_said(spatial: Path, tmp_path: Path):
    for name, settings in (("own", {}), ("said", {"size": 32}), ("both", {"size": [32, 32]})):
        assert run_export(make_config(spatial, tmp_path / name, **settings)) == 0
        plan = (tmp_path / name / "_run" / "plan.json").read_bytes()
        assert plan == (tmp_path / "own" / "_run" / "plan.json").read_bytes()
        assert tree(tmp_path / name) == tree(tmp_path / "own")


def test_augmentations_of_the_training_do_not_matter(spatial: Path, tmp_path: Path):
    """A crop of 40 pixels does not fit pictures of 48, which are never cropped."""
    cropped = Path(shutil.copytree(spatial, tmp_path / "run"))
    config = load_run(spatial).config
    crop = {"kind": "random_crop", "shorter_side": 40}
    settings = config.model_dump(mode="json")
    settings["data"]["augmentations"] = [crop, {"kind": "horizontal_flip"}]
    (cropped / "config.yaml").write_text(strict.dump(type(config).model_validate(settings)))
    for run, name in ((cropped, "cropped"), (spatial, "plain")):
        assert run_export(make_config(run, tmp_path / name, size=48)) == 0
    assert tree(tmp_path / "cropped") == tree(tmp_path / "plain")
    assert LatentDataset(tmp_path / "plain").latent_shape == (4, 12, 12)


@pytest.mark.parametrize(
    "size, message",
    [
        (50, r"size is 50, but .* 50 and 50 pixels are no multiple of 4: set size to \[48, 48\]"),
        ([24, 41], r"size is \[24, 41\], but .* set size to \[24, 40\] or \[24, 44\]\."),
    ],
)
def test_a_size_that_does_not_fit(spatial: Path, tmp_path: Path, size: Any, message: str):
    with pytest.raises(UserError, match=message) as refused:
        run_export(make_config(spatial, tmp_path / "out", size=size))
    assert "data.decode.size" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_only_convolutional_models_take_other_sizes(run_dir: Path, tmp_path: Path):
    message = "has the backbone mlp, whose weights take pictures of 32 pixels only"
    with pytest.raises(UserError, match=message):
        run_export(make_config(run_dir, tmp_path / "out", size=48))
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match=message):
        lm.load(run_dir).encode(np.zeros((32, 32), np.uint8), size=48)


def test_a_loaded_model_encodes_and_decodes_at_any_size(
    spatial: Path, model: Path, wide: Path, data: Path
):
    rows = LatentDataset(wide)[:SHARD_ROWS]
    files = pictures_of(sorted(data.glob("*.tar"))[0])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for path in (spatial, model):
            loaded = lm.load(path)
            codes = loaded.encode(files, batch_size=BATCH, size=WIDE)
            np.testing.assert_array_equal(codes.mu.numpy(), rows.latents["mu"])
            decoded = loaded.decode(codes.mu)
            assert decoded.shape == (SHARD_ROWS, 1, *WIDE)
            assert loaded.encode(files[0]).mu.shape == (1, 4, 8, 8)  # unchanged
            floats = loaded.encode(decoded, size=WIDE)
            assert floats.mu.shape == rows.latents["mu"].shape
    finally:
        torch.set_num_threads(threads)
    built = build_autoencoder(loaded.module.config, (1, *WIDE), seed=3, dtype=torch.float32)
    built.load_state_dict(loaded.module.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(decoded, built.eval().reconstruct(codes.mu))
    for bad in (torch.zeros(1, 3, 6, 10), torch.zeros(1, 4, 6), torch.zeros(1, 4, 0, 8)):
        with pytest.raises(UserError, match=r"latents are floats \[B, 4, h, w\]; got"):
            loaded.decode(bad)
    with pytest.raises(UserError, match=r"takes \[B, 1, 24, 40\] in \[0, 1\]"):
        loaded.encode(torch.zeros(1, 32, 32), size=WIDE)
    with pytest.raises(UserError, match=r"size: must be the pixels of a side"):
        loaded.encode(torch.zeros(1, 32, 32), size=0)


def test_maps_are_probed_beside_the_pixels_of_their_size(wide: Path, data: Path):
    scores = probe_export(wide, source=data)
    assert {score.features for score in scores} == {"latents", "pixels"}
    assert all(np.isfinite([score.linear, score.neighbours]).all() for score in scores)
