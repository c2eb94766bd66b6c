"""`load`, `decode` and `sample`: what they give, and what they refuse in words."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from webdataset.writer import TarWriter

import latentmill as lm
from pipeline.common.errors import UserError
from pipeline.data.index import build_index
from pipeline.models.interchange import from_pretrained
from tests.export.world import make_run
from tests.latentmill.world import SIZE, World


def test_a_model_says_what_it_is(world: World, model: lm.LoadedModel):
    text = f"LoadedModel('{world.model}': [3, 32, 32] in [0, 1] -> latents [10], cpu)"
    assert repr(model) == text
    assert not model.module.training


def test_codes_are_decoded_to_pictures(world: World, model: lm.LoadedModel, files: list[Path]):
    codes = model.encode(files)
    pictures = model.decode(codes.mu)
    assert pictures.shape == (len(files), 3, SIZE, SIZE)
    assert pictures.dtype == torch.float32
    assert pictures.min() >= 0
    assert pictures.max() <= 1
    expected = from_pretrained(world.model).reconstruct(codes.mu)
    assert torch.equal(pictures, expected)
    rows = lm.LatentDataset(world.export)[:]
    assert torch.allclose(model.decode(rows.mu), expected, atol=1e-5)  # an array, too
    again = model.encode(pictures)  # what comes out may go in
    assert again.mu.shape == codes.mu.shape


def test_draws_from_the_prior_depend_on_seed_and_place(model: lm.LoadedModel):
    pictures = model.sample(70, seed=2)
    assert pictures.shape == (70, 3, SIZE, SIZE)
    assert torch.allclose(model.sample(3, seed=2), pictures[:3], atol=1e-6)
    assert not torch.allclose(model.sample(3, seed=3), pictures[:3], atol=1e-3)
    assert not torch.allclose(pictures[0], pictures[1], atol=1e-4)
    generator = torch.Generator().manual_seed(7)
    z = torch.randn(70, *model.latent_shape, generator=generator)
    spread = [x.std(dim=0).mean().item() for x in (pictures, model.decode(z))]
    assert 0.7 < spread[0] / spread[1] < 1.4  # as other draws of N(0, I) do


@pytest.mark.parametrize(
    ("z", "words"),
    [
        (torch.zeros(10), "latents are floats [B, 10]; got torch.float32 [10]"),
        (torch.zeros(2, 9), "got torch.float32 [2, 9]"),
        (np.zeros((2, 10), np.int64), "got torch.int64 [2, 10]"),
        (torch.full((1, 10), torch.inf), "got numbers that are not finite"),
        ([0.0] * 10, "got list"),
        (lm.Codes(torch.zeros(1, 10), None), "got Codes: take their mu, or a sample()"),
    ],
)
def test_latents_of_another_shape_are_refused(model: lm.LoadedModel, z: object, words: str):
    with pytest.raises(UserError, match=re.escape(words)):
        model.decode(z)


def test_a_plain_autoencoder_has_nothing_to_draw(world: World, tmp_path: Path):
    plain = {"bottleneck": {"kind": "deterministic", "size": 3}}
    run = make_run(tmp_path / "run", world.shards, plain, has_average=False)
    with pytest.raises(UserError, match="holds no average"):
        lm.load(run)  # its config says that there is one
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("ema_decay: 0.999", "ema_decay: null"))
    model = lm.load(run)
    codes = model.encode(world.photos / "00.jpg")
    assert codes.logvar is None
    assert model.decode(codes.mu).shape == (1, 1, SIZE, SIZE)
    with pytest.raises(UserError, match="these codes have none: use `mu`"):
        codes.sample()
    with pytest.raises(UserError, match="deterministic, which has no prior"):
        model.sample(1)
    with pytest.raises(UserError, match="n is 0, but must be at least 1"):
        model.sample(0)


def test_arrays_are_encoded_as_their_data_holds_them(tmp_path: Path):
    values = np.random.Generator(np.random.Philox(3)).uniform(-2, 4, (6, 5, 7)).astype(np.float32)
    (tmp_path / "data").mkdir()
    with TarWriter(str(tmp_path / "data/0.tar"), mtime=0) as tar:
        for number, one in enumerate(values):
            tar.write({"__key__": str(number), "npy": one})
            np.save(tmp_path / f"{number}.npy", one)
    build_index(tmp_path / "data")
    decode = {"kind": "array", "shape": [5, 7], "range": [-2, 4]}
    model = {
        "backbone": {"kind": "mlp", "hidden": [8]},
        "bottleneck": {"kind": "gaussian", "size": 2},
    }
    config = {"run_dir": str(tmp_path / "run"), "model": model, "batch_size": 2, "num_steps": 1}
    config |= {"data": {"path": str(tmp_path / "data"), "decode": decode, "split": "all"}}
    config |= {
        "optimizer": {"learning_rate": {"warmup_samples": 0}},
        "evaluation": {"split": "all"},
    }
    assert lm.train(lm.TrainConfig(**config, monitor={"wandb": {"mode": "disabled"}})) == 0
    loaded = lm.load(tmp_path / "run")
    unit = torch.from_numpy((values + 2) / 6)
    with torch.no_grad():
        expected = loaded.module(unit, mode="encode").posterior.mu
    files = [tmp_path / f"{number}.npy" for number in range(len(values))]
    for given in (values, torch.from_numpy(values), list(values), files, files[0].read_bytes()):
        found = loaded.encode(given).mu
        assert torch.allclose(found, expected[: len(found)], atol=1e-6)
    for wrong, words in (
        (
            values.astype(np.float64),
            "takes float32 [B, 5, 7] in [-2, 4], as its data holds; got fl",
        ),
        (values[:, :4], "got [6, 4, 7]"),
        (values + 9, "declared range [-2.0, 4.0]"),
        (values * np.nan, "declared range"),
    ):
        with pytest.raises(UserError, match=re.escape(words)):
            loaded.encode(wrong)


def test_what_is_no_model_is_refused_in_words(world: World, tmp_path: Path):
    wanted = "Give the folder that `latentmill export-model RUN FOLDER` wrote, or a run directory"
    (tmp_path / "empty").mkdir()
    for path, words in (
        (tmp_path / "none", f"{tmp_path / 'none'} does not exist. {wanted}"),
        ("stabilityai/sd-vae-ft-mse", "does not exist. Give the folder"),
        ("stabilityai/sd-vae-ft-mse", "Names of the Hugging Face Hub are not looked up."),
        ("s3://bucket/model", "s3://bucket/model is a URL: copy the model's folder"),
        (world.model / "model.safetensors", "model.safetensors is a file, and a model is a folder"),
        (world.export, "holds the latents of an export: latentmill.LatentDataset reads them"),
        (world.run / "checkpoints/step-4", f"load {world.run}, and choose it by step="),
        (world.run / "checkpoints", f"holds no model. {wanted}"),
        (world.shards, f"holds shards of a data set. {wanted}"),
        (tmp_path / "empty", f"holds no model. {wanted}"),
    ):
        with pytest.raises(UserError, match=re.escape(words)):
            lm.load(path)


def test_a_step_that_is_not_there_is_refused(world: World, tmp_path: Path):
    with pytest.raises(UserError, match="step = 'best', but .* is an exported model"):
        lm.load(world.model, step="best")
    with pytest.raises(UserError, match="step is 'latest', but must be a number, 'newest' or"):
        lm.load(world.run, step="latest")
    with pytest.raises(UserError, match="step-3"):
        lm.load(world.run, step=3)
    shutil.copytree(world.model, tmp_path / "model")
    weights = tmp_path / "model/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(UserError, match="is damaged"):
        lm.load(tmp_path / "model")
