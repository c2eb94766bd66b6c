"""Exported models: the checkpoint's very weights, loaded without the run; damage and mistakes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.__main__ import main
from pipeline.common import strict
from pipeline.common.errors import UserError
from pipeline.config import TrainConfig
from pipeline.data.decode import ArrayDecode
from pipeline.data.index import Index
from pipeline.export.model import export_model
from pipeline.models.interchange import from_pretrained, read_description
from pipeline.training.loading import load_run
from tests.config.runs import World, write_shards
from tests.processes import ROOT

STEPS = (2, 4)
IMAGES = ("checkpoint.every_steps=2", "corruptions=[{kind: masking}]")
ARRAYS = (
    "data.decode={kind: array, shape: [2, 3], range: [-1, 3]}",
    "precision=fp64",
    "ema_decay=null",
    "monitor.log_every_steps=4",
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("interchange")
    write_shards(folder / "shards")
    return World(folder / "shards", folder)


@pytest.fixture(scope="module")
def run(world: World) -> Path:
    """A run with a corruption, whose moving average is not its weights."""
    return world.run(IMAGES)


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export to read only."""
    out = tmp_path_factory.mktemp("exported") / "model"
    export_model(run, out)
    return out


@pytest.fixture
def copy(exported: Path, tmp_path: Path) -> Path:
    """An export to damage."""
    return Path(shutil.copytree(exported, tmp_path / "copy"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_the_weights_are_the_checkpoints_bit_by_bit(run: Path, tmp_path, step: int, weights: Any):
    out = tmp_path / "out"
    report = export_model(run, out, step=step, weights=weights)
    file = {"ema": "ema.safetensors", "raw": "model.safetensors"}[weights]
    expected = load_file(run / "checkpoints" / f"step-{step}" / file)
    found = from_pretrained(out).state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name
    assert (report.step, report.weights) == (step, weights)
    assert report.num_parameters == sum(value.numel() for value in expected.values())


def test_steps_and_kinds_of_weights_differ(run: Path, tmp_path: Path):
    """Without this, an export that ignores its options would pass the test above."""
    digests = {
        export_model(run, tmp_path / f"{step}-{weights}", step=step, weights=weights).weights_sha256
        for step in STEPS
        for weights in ("ema", "raw")
    }
    assert len(digests) == 4


def test_a_forward_pass_equals_the_runs_model(run: Path, exported: Path):
    x, keys = torch.rand(5, 3, 8, 8), torch.arange(5)
    model, expected = from_pretrained(exported), load_run(run).model
    assert not model.training
    for found, wanted in (
        (model(x, keys=keys), expected(x, keys=keys)),
        (model(x, mode="encode"), expected(x, mode="encode")),
    ):
        assert torch.equal(found.posterior.mu, wanted.posterior.mu)
        assert torch.equal(found.posterior.logvar, wanted.posterior.logvar)
    assert torch.equal(model(x, keys=keys).decoded, expected(x, keys=keys).decoded)


def test_the_description_holds_what_a_consumer_needs(world: World, run: Path, exported: Path):
    config, index = strict.load(TrainConfig, run / "config.yaml", []), Index.open(world.shards)
    state = json.loads((run / "checkpoints" / "step-4" / "state.json").read_text())
    found = json.loads((exported / "config.json").read_text())
    assert found["format"] == "latentmill-model-1"
    assert found["model"] == config.model.model_dump(mode="json")
    assert (found["event_shape"], found["latent_shape"]) == ([3, 8, 8], [2])
    assert found["stored"] == {"dtype": "uint8", "range": [0.0, 255.0]}
    assert found["decode"] == config.data.decode.model_dump(mode="json")
    assert (found["precision"], found["weights"]) == ("fp32", "ema")
    assert (found["step"], found["samples_seen"]) == (4, 32)
    assert found["dataset_id"] == index.dataset_id
    assert found["order_id"] == state["order_id"]
    assert found["versions"] == state["versions"]
    assert found["weights_sha256"] == load_run(run).weights_sha256


def test_arrays_say_their_range_and_float64_stays(world: World, tmp_path: Path):
    run = world.run(ARRAYS)
    export_model(run, tmp_path / "out", weights="raw")
    description = read_description(tmp_path / "out")
    assert description.stored.dtype == "float32"
    assert description.event_shape == (2, 3)
    decode = load_run(run, weights="raw").config.data.decode
    assert isinstance(decode, ArrayDecode)
    values = torch.tensor([-1.0, 0.5, 3.0])
    low, high = description.stored.range
    assert torch.equal((values - low) / (high - low), decode.to_unit(values))
    model = from_pretrained(tmp_path / "out")
    assert {value.dtype for value in model.parameters()} == {torch.float64}
    narrow = from_pretrained(tmp_path / "out", device="cpu", dtype=torch.float32)
    assert {value.dtype for value in narrow.parameters()} == {torch.float32}


def test_the_same_run_gives_the_same_bytes_and_no_place(run: Path, exported: Path, tmp_path: Path):
    moved = tmp_path / "moved"
    shutil.copytree(run, moved)
    export_model(moved, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(exported)
    assert str(run.parent).encode() not in b"".join(contents(exported).values())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "moved"]  # no litter


def test_how_the_training_saved_memory_does_not_show(world: World, exported: Path, tmp_path: Path):
    """The whole training with gradient checkpointing ends in the same bits, and in these files."""
    run = world.run((*IMAGES, "model.gradient_checkpointing=true"))
    export_model(run, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(exported)


def test_three_lines_load_it_elsewhere(exported: Path, run: Path, tmp_path: Path):
    shutil.copytree(exported, tmp_path / "OUT")
    code = (
        "import torch; x = torch.full((2, 3, 8, 8), 0.25)\n"
        "from pipeline.models.interchange import from_pretrained\n"
        'model = from_pretrained("OUT")\n'
        'z = model(x, mode="encode").posterior.mu\n'
        "print(z.tolist())"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    x = torch.full((2, 3, 8, 8), 0.25)
    assert json.loads(ended.stdout) == load_run(run).model(x, mode="encode").posterior.mu.tolist()


def test_the_verb_reports_and_refuses_a_place_that_is_taken(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    argv = ["export-model", str(run), str(tmp_path / "new" / "out"), "--weights", "raw", "--json"]
    assert main(argv) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["step"] == 4
    assert report["weights_sha256"] == load_run(run, weights="raw").weights_sha256
    before = contents(tmp_path / "new" / "out")
    assert main(argv) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ")
    assert f"{tmp_path / 'new' / 'out'} exists already" in errors
    assert contents(tmp_path / "new" / "out") == before


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"run": "{tmp}/none"}, "{tmp}/none is no run directory"),
        ({"step": 3}, "there is no checkpoint .*step-3; there: step-2, step-4"),
        ({"out": "{tmp}/file/out"}, "out', but must be a directory, and {tmp}/file is a file"),
        ({"out": "{tmp}/file"}, "{tmp}/file exists already"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_exported_leaves_nothing(run, tmp_path: Path, changed: Any, message: str):
    (tmp_path / "file").touch()
    given = {"run": str(run), "out": str(tmp_path / "out"), "step": None} | changed
    places = [Path(given.pop(name).replace("{tmp}", str(tmp_path))) for name in ("run", "out")]
    with pytest.raises(UserError, match=message.replace("{tmp}", str(tmp_path))):
        export_model(*places, **given)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_run_without_average_has_only_raw_weights(world: World, tmp_path: Path):
    with pytest.raises(UserError, match="holds no averaged weights.*raw"):
        export_model(world.run(ARRAYS), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def edit(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def flip(folder: Path, name: str, offset: int) -> None:
    content = bytearray((folder / name).read_bytes())
    content[offset] ^= 1
    (folder / name).write_bytes(content)


def truncate(folder: Path, name: str) -> None:
    (folder / name).write_bytes((folder / name).read_bytes()[:-7])


def drop_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["encoder.1.bias"]
    save_file(tensors, folder / "model.safetensors")


MLP = {"kind": "mlp", "hidden": [7]}
GAUSSIAN = {"kind": "gaussian", "size": 2}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: shutil.rmtree(f), "is no exported model: it has no config.json"),
        (lambda f: (f / "config.json").unlink(), "is no exported model: it has no config.json"),
        (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing or damaged"),
        (lambda f: truncate(f, "config.json"), "config.json cannot be read"),
        (lambda f: truncate(f, "model.safetensors"), "model.safetensors is missing or damaged"),
        (lambda f: flip(f, "model.safetensors", 0), "model.safetensors is missing or damaged"),
        (lambda f: flip(f, "model.safetensors", -1), "its weights have the sha256 [0-9a-f]{64}, "),
        (drop_a_tensor, "its weights have the sha256 [0-9a-f]{64}, "),
        (lambda f: edit(f, format="latentmill-model-2"), "says format 'latentmill-model-2'; this"),
        (lambda f: (f / "config.json").write_text("[]"), "says format None"),
        (lambda f: edit(f, step=-1), r"config.json has 1 problem:\s+step: .*-1"),
        (lambda f: edit(f, stepp=1), "stepp: unknown key"),
        (lambda f: edit(f, model={"backbone": MLP, "bottleneck": GAUSSIAN}), "does not hold the"),
        (lambda f: edit(f, model={"backbone": {"kind": "burgess"}}), "burgess takes images"),
    ],
)
def test_damage_is_found_and_named(copy: Path, damage: Any, message: str):
    damage(copy)
    with pytest.raises(UserError, match=message) as raised:
        from_pretrained(copy)
    assert str(copy) in str(raised.value)
    assert len(str(raised.value).splitlines()) < 12


def test_every_flipped_byte_of_the_weights_is_found(copy: Path):
    size = (copy / "model.safetensors").stat().st_size
    start = 8 + int.from_bytes((copy / "model.safetensors").read_bytes()[:8], "little")
    for offset in range(start, size, max((size - start) // 40, 1)):
        flip(copy, "model.safetensors", offset)
        with pytest.raises(UserError, match="damaged"):
            from_pretrained(copy)
        flip(copy, "model.safetensors", offset)
    from_pretrained(copy)
