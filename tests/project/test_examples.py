"""The examples run as their docstrings say, and resume; on real data."""

import importlib.util
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch.utils.data import DataLoader

from pipeline.data.pack.pack import pack
from pipeline.data.pack.sources import Sprites
from pipeline.latents import LatentDataset
from tests.export.foreign import picture, write_shards
from tests.export.world import make_config, make_data, make_run, run_export
from tests.latents.exports import make_rows, write_export
from tests.processes import ROOT
from tests.project.downstream import (
    BROKEN,
    FORMATS,
    LATENT_SIZE,
    NUM_DIGITS,
    World,
    make_world,
    run_example,
)

GAUSSIAN = {"bottleneck": {"kind": "gaussian", "size": 3}}
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
NUM_VALID = NUM_DIGITS - 1


@pytest.fixture(scope="module")
def sprites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sprites")
    pack(Sprites(count=600, seed=0, shard_samples=100), folder, workers=1)
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("downstream"))


def load(name: str) -> ModuleType:
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def losses(text: str) -> list[float]:
    return [float(value) for value in re.findall(r"squared error ([\d.]+)", text)]


def test_the_plain_loop_resumes(sprites: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    plain_loop = load("plain_loop")
    whole, pieces = tmp_path / "whole.pt", tmp_path / "pieces.pt"
    plain_loop.train(str(sprites), whole, 24, save_every=8)
    learned = losses(capsys.readouterr().out)
    for end in (5, 17, 24):  # 9 steps are an epoch
        plain_loop.train(str(sprites), pieces, end, save_every=100)
    one, other = (torch.load(path, weights_only=True) for path in (whole, pieces))
    assert one["data"] == other["data"]
    assert one["data"]["T"] == 24 * 64
    assert all(torch.equal(one["model"][name], other["model"][name]) for name in one["model"])
    assert learned == sorted(learned, reverse=True)


@pytest.mark.slow
def test_the_plain_loop_as_it_is_typed(sprites: Path, tmp_path: Path):
    plain = ROOT / "examples" / "plain_loop.py"
    argv = [sys.executable, plain, sprites, tmp_path / "plain.pt", "--steps", "60"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=True)
    assert re.fullmatch(r"step 50: .* per image\nstep 60: .* per image\n", done.stdout)
    assert done.stderr == ""
    again = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=True)
    assert again.stdout == ""  # done already


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short_and_says_how_it_is_typed(path: Path):
    text = path.read_text()
    assert len(text.splitlines()) <= 60
    docstring = text.split('"""')[1]
    assert re.search(rf"^python examples/{path.name} ", docstring, re.MULTILINE), docstring


@pytest.mark.slow
def test_the_linear_probe_reads_labels_and_numbers(world: World, tmp_path: Path):
    printed = run_example("linear_probe", world.export, cwd=tmp_path)
    found = re.findall(r"^(\w+): (-?[\d.]+), chance ([\d.]+)$", printed, re.MULTILINE)
    scores = {name: (float(score), float(chance)) for name, score, chance in found}
    assert set(scores) == {"label", "slant"}, printed  # `writer` is no number
    accuracy, chance = scores["label"]
    assert chance < 0.2
    assert accuracy > 0.7
    assert scores["slant"][0] > 0.5


@pytest.mark.slow
def test_neighbours_are_the_nearest_and_look_alike(world: World, tmp_path: Path):
    printed = run_example("nearest", world.export, cwd=tmp_path)
    num_queries = -(-NUM_VALID // 20)
    counts = f"{NUM_VALID - num_queries} vectors of {LATENT_SIZE} numbers, {num_queries} queries"
    assert printed.startswith(counts + "\n")
    recall = re.search(r"^recall@10: ([\d.]+)$", printed, re.MULTILINE)
    assert recall, printed
    assert float(recall[1]) > 0.95
    neighbours = dict(re.findall(r"^(\d+): (\d+, \d+, \d+)$", printed, re.MULTILINE))
    assert len(neighbours) == 5
    pairs = [(query, key) for query, keys in neighbours.items() for key in keys.split(", ")]
    assert all(query != key for query, key in pairs)
    same = [world.labels[query] == world.labels[key] for query, key in pairs]
    assert np.mean(same) > 0.6  # by chance 0.1


@pytest.mark.soak
def test_the_flow_draws_the_digits_it_is_asked_for(world: World, tmp_path: Path):
    printed = run_example("latent_flow", world.model, world.export, "flow.png", 150, cwd=tmp_path)
    loss = [float(value) for value in re.findall(r"^epoch \d+: loss ([\d.]+)$", printed, re.M)]
    assert len(loss) == 150
    assert np.mean(loss[-20:]) < 0.9 * np.mean(loss[:5])
    with Image.open(tmp_path / "flow.png") as picture:
        grid = np.asarray(picture).astype(np.float32) / 255
    cells = grid.reshape(4, 68, 12, 68).swapaxes(1, 2)  # [rows, columns, H, W]
    cells = cells[:, :, 2:-2:2, 2:-2:2]  # without borders, and one of four equal pixels
    small = cells.reshape(4 * 12, 8, 4, 8, 4).mean(axis=(2, 4)).reshape(4, 12, 64)
    images, labels = load_digits(return_X_y=True)
    found = LogisticRegression(max_iter=200).fit(images / 16, labels).predict
    old, new = small[0], small[1:]
    assert np.mean(found(old) == list(world.labels.values())[:12]) > 0.7
    assert np.mean(found(new.reshape(-1, 64)) == np.repeat([0, 1, 2], 12)) > 0.7  # by chance 0.1
    spread = [zeros.std(axis=0).mean() for zeros in (new[0], images[labels == 0] / 16)]
    assert spread[0] > 0.2 * spread[1]  # no one zero again and again; decoded ones are smoother


@pytest.mark.slow
def test_hugging_face_datasets_restore_the_shapes(world: World, tmp_path: Path):
    printed = run_example("huggingface", world.export, cwd=tmp_path)
    assert f"mu: List(Value('float32'), length={LATENT_SIZE})\n" in printed
    assert f"latent: List(Value('float32'), length={LATENT_SIZE})\n" in printed
    num_test = -(-NUM_VALID // 10)
    for name, count in (("train", NUM_VALID - num_test), ("test", num_test)):
        line = f"{name}: {count} rows, latents (32, {LATENT_SIZE}), labels torch.int64\n"
        assert line in printed


@pytest.mark.slow
def test_hugging_face_datasets_take_maps_without_labels(tmp_path: Path):
    shards = [make_rows(number, 70, (2, 3, 4), notes=False) for number in range(2)]
    out = write_export(tmp_path / "export", shards, ["parquet"])
    printed = run_example("huggingface", out, cwd=tmp_path)
    line = r"^train: \d+ rows, latents \(32, 2, 3, 4\), labels torch.int64$"
    assert re.search(line, printed, re.MULTILINE), printed


@pytest.mark.slow
def test_pictures_and_latents_are_joined(world: World, tmp_path: Path):
    printed = run_example("join_wds", world.export, world.shards, cwd=tmp_path)
    first = f"picture (3, 32, 32), mu ({LATENT_SIZE},), label {world.labels['0000']}"
    assert printed == f"0000: {first}\n{NUM_VALID} pairs\n"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:unclosed file")  # webdataset leaves its shards to the collector
def test_every_pair_has_one_key_and_one_label(world: World):
    pairs = load("join_wds").open_pairs(str(world.export), str(world.shards))
    found = [(key, label) for key, _, _, label in pairs]
    assert found == [item for item in world.labels.items() if item[0] != BROKEN]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:unclosed file")
def test_shards_of_other_data_are_not_joined(world: World, tmp_path: Path):
    others = tmp_path / "shards"
    shutil.copytree(world.shards, others)
    first, second = sorted(others.glob("*.tar"))[:2]
    second.replace(first)
    with pytest.raises(AssertionError, match="keys differ"):
        list(load("join_wds").open_pairs(str(world.export), str(others)))


@pytest.fixture(scope="module")
def unlabelled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A run, shards of pictures alone, and their export in all formats."""
    root = tmp_path_factory.mktemp("unlabelled")
    run = make_run(root / "run", make_data(root / "sprites", shards=1), GAUSSIAN)
    pictures = {f"{i:03d}.png": picture(3 * i) for i in range(80)}
    shards = write_shards(root / "shards", {"0.tar": pictures})
    config = make_config(run, root / "out", data={"path": str(shards)}, formats=FORMATS)
    assert run_export(config) == 0
    return run, shards, root / "out"


def test_rows_without_labels_say_none(unlabelled: tuple[Path, Path, Path]):
    ds = LatentDataset(unlabelled[2])
    assert (ds[3].label, ds[3]["label"], ds[3].metadata, ds[3].text) == (-1, -1, None, None)
    assert set(ds.column("label").tolist()) == {-1}
    assert set(ds.column("label_text").tolist()) == {None}
    assert ds.to_pandas()["label"].eq(-1).all()
    (batch,) = DataLoader(ds, batch_size=80)
    assert batch["label"].eq(-1).all()
    assert batch["metadata"] == batch["text"] == [""] * 80
    assert all((rows.labels == -1).all() for rows in ds.batches(32))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:unclosed file")
def test_the_examples_take_an_export_without_labels(
    unlabelled: tuple[Path, Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """For `huggingface` see `test_hugging_face_datasets_take_maps_without_labels`."""
    run, shards, out = unlabelled
    argv = ["latent_flow", str(run), str(out), str(tmp_path / "flow.png"), "1"]
    monkeypatch.setattr(sys, "argv", argv)
    runpy.run_path(str(ROOT / "examples/latent_flow.py"), run_name="__main__")
    assert (tmp_path / "flow.png").exists()
    assert load("linear_probe").probe(str(out)) == {}
    load("nearest").main(str(out))
    assert "76 vectors of 3 numbers, 4 queries" in capsys.readouterr().out
    pairs = list(load("join_wds").open_pairs(str(out), str(shards)))
    assert [(key, label) for key, _, _, label in pairs] == [(f"{i:03d}", -1) for i in range(80)]
    with pytest.raises(SystemExit, match="has no labels to learn"):
        load("latents").train(str(out), tmp_path / "probe.pt", 1)


def test_the_linear_probe_leaves_out_what_is_no_number():
    texts = {"{": {}, "[1]": {}, "NaN": {}, '{"a": 1, "b": true, "c": "x"}': {"a": 1}}
    for text, expected in texts.items():
        assert load("linear_probe").numbers_of(text) == expected
