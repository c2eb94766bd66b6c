"""TrainConfig from Python: the same settings, and the same words about mistakes, as from YAML."""

import json
from pathlib import Path
from typing import Any

import pytest

import latentmill as lm
from pipeline.common import strict
from pipeline.config import read_config
from pipeline.data.settings import DataConfig
from pipeline.models.autoencoder import ModelConfig
from pipeline.models.backbones import Mlp
from tests.latentmill.world import World, settings

GOOD: dict[str, Any] = {"run_dir": "r", "data": {"path": "d"}}


def problems(error: BaseException) -> list[str]:
    """The lines of an error below its first, which says where the problems are."""
    first, *lines = str(error).splitlines()
    assert first.endswith("1 problem:" if len(lines) == 1 else f"{len(lines)} problems:")
    return lines


@pytest.mark.parametrize(
    "wrong",
    [
        {"batchsize": 3},
        {"data": {"pth": "x"}, "num_steps": 0},
        {"data": {"path": "x", "decode": {"kind": "image", "sise": 3}}},
        {"model": {"backbone": {"kind": "burges"}}, "batch_size": 1.5, "compile": "maybe"},
        {"objective": {"regularisers": [{"kind": "kl", "weight": {"kind": "linear", "x": 1}}]}},
        {"data": 5, "batch_size": "many", "corruptions": [{"kind": "masking", "fraction": 3}]},
        {"model": {"bottleneck": {"kind": "deterministic"}}, "objective": {"regularisers": ["kl"]}},
        {"batch_size": 10, "accumulation": 3},
        {"precision": "fp16", "ema_decay": 1},
        {"evaluation": {"patience": 3}},
        {"data": {"path": "d", "decode": {"size": 48}}},
    ],
    ids=str,
)
def test_a_mistake_reads_as_in_a_file(wrong: dict[str, Any], tmp_path: Path):
    (tmp_path / "x.yaml").write_text(json.dumps(GOOD | wrong))
    with pytest.raises(lm.UserError) as of_file:
        lm.TrainConfig.load(tmp_path / "x.yaml")
    with pytest.raises(lm.UserError) as of_python:
        lm.TrainConfig(**GOOD | wrong)
    assert problems(of_python.value) == problems(of_file.value)
    assert str(of_python.value).startswith("TrainConfig has ")


def test_a_part_built_by_itself_says_the_same():
    with pytest.raises(lm.UserError) as caught:
        Mlp(hiden=(3,))
    assert str(caught.value) == (
        "Mlp has 1 problem:\n  hiden: unknown key (got [3]); did you mean 'hidden'?"
    )


def test_parts_and_plain_values_make_the_same_config():
    data, model = DataConfig(path="d"), ModelConfig(backbone=Mlp(hidden=(3,)))
    built = lm.TrainConfig(run_dir="r", data=data, model=model)
    plain = {"model": {"backbone": {"kind": "mlp", "hidden": [3]}}}
    assert built == lm.TrainConfig(**GOOD | plain)
    assert built.data is data


def test_a_file_and_its_overrides(world: World, tmp_path: Path):
    path = tmp_path / "x.yaml"
    path.write_text(json.dumps(settings(world.shards, tmp_path / "run")))
    config = lm.TrainConfig.load(str(path), "batch_size=4", "data.decode.size=64")
    assert (config.batch_size, config.data.decode.event_shape) == (4, (3, 64, 64))
    assert config == read_config(path, ["batch_size=4", "data.decode.size=64"])
    with pytest.raises(lm.UserError, match="batchsize: unknown key .*; did you mean 'batch_size'"):
        lm.TrainConfig.load(path, "batchsize=4")
    assert lm.TrainConfig.load("vae", "seed=5").seed == 5  # shipped settings
    with pytest.raises(lm.UserError, match="no/such.yaml does not exist"):
        lm.TrainConfig.load("no/such.yaml")


def test_a_runs_own_config_is_read_as_by_a_resumed_run(world: World):
    """A config without a version means the same to a resumed run as at its first start."""
    config = lm.TrainConfig.load(world.run / "config.yaml")
    assert config == lm.TrainConfig(**settings(world.shards, world.run)).resolved()
    assert strict.dump(config) == (world.run / "config.yaml").read_text()
