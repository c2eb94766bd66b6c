"""Who reads a run's weights needs the optimizer's moments neither whole nor at all; training does.

Each damage is done to a copy of one small run; then it is evaluated, exported and trained on.
"""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline.checkpoints.folder import list_checkpoints, verify_checkpoint
from pipeline.common import strict
from pipeline.common.errors import DONE, WRONG_USE, UserError
from pipeline.config import TrainConfig
from pipeline.evaluation.trained import evaluate_run
from pipeline.export.__main__ import main as export
from pipeline.train import train
from pipeline.training.loading import load_run
from tests.config.runs import BASE
from tests.export.world import tree

NUM_STEPS = 4  # checkpoints at 2 and 4


def zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def one_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], None]] = {"zeros": zeros, "absent": Path.unlink}
each_damage = pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())


@dataclass(frozen=True)
class Runs:
    """A run, and where copies of it are used."""

    original: Path
    shards: Path
    place: Path

    def copy(self) -> Path:
        """A copy, to be damaged."""
        return Path(shutil.copytree(self.original, self.place / "run"))

    def train(self, run_dir: Path) -> int:
        """The command that the run was trained by."""
        overrides = [
            f"run_dir={run_dir}",
            f"data.path={self.shards}",
            f"num_steps={NUM_STEPS}",
            "ema_decay=0.5",  # so that averaged weights differ from raw ones
            "checkpoint.every_steps=2",
        ]
        return train(strict.load(TrainConfig, None, overrides, text=json.dumps(BASE)))

    def export(self, run_dir: Path, name: str, **settings: object) -> int:
        """Export all samples to the folder of that name; the exit code."""
        config = self.place / "export.yaml"
        config.write_text(f"run: {run_dir}\nout: {self.place / name}\nbatch_size: 16\n")
        return export([str(config), *(f"{key}={value}" for key, value in settings.items())])

    def exported(self, run_dir: Path, name: str, **settings: object) -> Mapping[str, str]:
        """The bytes of an export, as hashes."""
        assert self.export(run_dir, name, **settings) == DONE
        return tree(self.place / name)


@pytest.fixture(scope="module")
def original(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    assert Runs(folder, tiny_shards, folder).train(folder / "run") == DONE
    return folder / "run"


@pytest.fixture
def runs(original: Path, tiny_shards: Path, tmp_path: Path) -> Runs:
    return Runs(original, tiny_shards, tmp_path)


def newest(run_dir: Path) -> Path:
    return list_checkpoints(run_dir / "checkpoints")[0]


def names(run_dir: Path) -> list[str]:
    """The checkpoints, and those that were set aside, without the unique part of their names."""
    found = (run_dir / "checkpoints").iterdir()
    return sorted(re.sub(r"\.corrupt-.*", ".corrupt", path.name) for path in found)


def sha256(run_dir: Path, **which: object) -> str:
    return load_run(run_dir, **which).weights_sha256


@each_damage
def test_reading_needs_no_optimizer(runs: Runs, damage: Callable[[Path], None], tmp_path: Path):
    damaged = runs.copy()
    damage(newest(damaged) / "optimizer.safetensors")
    before = tree(damaged)
    found = evaluate_run(damaged, out=tmp_path / "card")
    assert found.step == NUM_STEPS
    assert found.figures == evaluate_run(runs.original).figures
    exports: list[Mapping[str, str]] = []
    for weights in ("ema", "raw"):
        exports.append(runs.exported(damaged, weights, weights=weights))
        expected = runs.exported(runs.original, f"expected-{weights}", weights=weights)
        assert exports[-1] == expected
    assert exports[0].keys() == exports[1].keys()
    assert exports[0] != exports[1]
    assert tree(damaged) == before  # readers set nothing aside


@each_damage
def test_training_goes_on_from_an_older_checkpoint(
    runs: Runs, damage: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
):
    damaged = runs.copy()
    path = newest(damaged)
    damage(path / "optimizer.safetensors")
    capsys.readouterr()
    assert runs.train(damaged) == DONE
    printed = capsys.readouterr().err
    assert printed.count(f"warning: the checkpoint {path} is damaged (") == 1
    assert "step 2/4 " not in printed
    assert "step 3/4 " in printed
    assert names(damaged) == ["step-2", "step-4", "step-4.corrupt"]
    verify_checkpoint(newest(damaged))
    for weights in ("raw", "ema"):
        assert sha256(damaged, weights=weights) == sha256(runs.original, weights=weights)


def test_training_begins_anew_without_an_older_checkpoint(
    runs: Runs, capsys: pytest.CaptureFixture[str]
):
    damaged = runs.copy()
    shutil.rmtree(damaged / "checkpoints" / "step-2")
    zeros(newest(damaged) / "optimizer.safetensors")
    capsys.readouterr()
    assert runs.train(damaged) == DONE
    printed = capsys.readouterr().err
    assert printed.count("is damaged (optimizer.safetensors does not have the sha256") == 1
    assert "step 1/4 " in printed
    assert names(damaged) == ["step-2", "step-4", "step-4.corrupt"]
    assert sha256(damaged) == sha256(runs.original)


def test_a_damaged_average_matters_to_who_asks_for_it(
    runs: Runs, capsys: pytest.CaptureFixture[str]
):
    damaged = runs.copy()
    one_bit(newest(damaged) / "ema.safetensors")
    assert load_run(damaged, weights="raw").step == NUM_STEPS
    expected = runs.exported(runs.original, "expected", weights="raw")
    assert runs.exported(damaged, "raw", weights="raw") == expected

    # Without a step an older one is taken; for an explicit step no other one is.
    capsys.readouterr()
    assert sha256(damaged) == sha256(runs.original, step=2)
    assert evaluate_run(damaged).figures == evaluate_run(runs.original, step=2).figures
    assert f"warning: skipping {newest(damaged)}: ema.safetensors" in capsys.readouterr().err
    with pytest.raises(UserError, match="step-4 is damaged: ema.safetensors does not have"):
        evaluate_run(damaged, step=NUM_STEPS)
    assert runs.export(damaged, "ema", weights="ema", step=NUM_STEPS) == WRONG_USE
    assert "step-4 is damaged: ema.safetensors does not have" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["model.safetensors", "state.json"])
def test_what_every_reader_needs_is_verified_for_each(runs: Runs, name: str):
    damaged = runs.copy()
    one_bit(newest(damaged) / name)
    for weights in ("raw", "ema"):
        with pytest.raises(UserError, match=f"step-4 is damaged: {name} does not have the sha256"):
            load_run(damaged, step=NUM_STEPS, weights=weights)
        assert load_run(damaged, weights=weights).step == 2
