"""Every file under configs/ is valid, says how to use it, and owns no setting of another."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig
from pydantic import BaseModel

from pipeline.common import strict
from pipeline.common.errors import UserError
from pipeline.common.strict.dialect import parse
from pipeline.config import TrainConfig
from pipeline.export.settings import ExportConfig
from tests.processes import ROOT

CONFIGS = ROOT / "configs"
TREES: dict[str, type[BaseModel]] = {"train": TrainConfig, "export": ExportConfig}


def files(pattern: str) -> list[Any]:
    return [
        pytest.param(path, id=str(path.relative_to(CONFIGS)))
        for path in sorted(CONFIGS.glob(pattern))
    ]


OUR_YAML = [file for folder in TREES for file in files(f"{folder}/*.yaml")]


def test_the_four_variants_are_four_files():
    names = {path.stem for path in (CONFIGS / "train").glob("*.yaml")}
    assert {"ae", "dae", "vae", "beta_vae"} <= names
    assert OUR_YAML


def test_no_file_is_left_out():
    known = {"train", "export", "accelerate", "deepspeed", "sweeps"}
    assert {path.name for path in CONFIGS.iterdir()} <= known


@pytest.mark.parametrize("path", OUR_YAML)
def test_it_loads_and_its_resolved_form_loads_to_the_same(path: Path):
    tree = TREES[path.parent.name]
    config = strict.load(tree, path, [])
    assert strict.load(tree, None, [], text=strict.dump(config)) == config


@pytest.mark.parametrize("path", OUR_YAML)
def test_it_is_short_and_opens_with_a_comment(path: Path):
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# ")
    stated = [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
    assert 2 <= len(stated) <= 30


@pytest.mark.parametrize("path", OUR_YAML)
def test_it_states_no_setting_that_has_its_default_already(path: Path):
    """A default that is repeated hides what the file is about."""
    tree = TREES[path.parent.name]
    given, _ = parse(path.read_text())
    resolved = strict.load(tree, path, [])
    for key in given:
        without = {name: value for name, value in given.items() if name != key}
        try:
            other = strict.load(tree, None, [], text=json.dumps(without))
        except UserError:
            continue  # no default: it must be given
        assert other != resolved, key


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, f"{path}.{key}" if path else key)
    else:
        yield path, value


@pytest.mark.parametrize("path", files("accelerate/*.yaml"))
def test_accelerate_files_hold_the_topology_only(path: Path):
    ClusterConfig.from_yaml_file(str(path))  # refuses unknown keys
    allowed = {
        *("compute_environment", "distributed_type", "use_cpu", "rdzv_backend", "same_network"),
        *("num_processes", "num_machines", "machine_rank", "main_process_port"),
        *("main_process_ip", "gpu_ids", "deepspeed_config.deepspeed_config_file"),
        "deepspeed_config.deepspeed_multinode_launcher",
    }
    assert {name for name, _ in leaves(yaml.safe_load(path.read_text()))} <= allowed


def test_deepspeed_files_hold_the_sharding_only():
    for path in CONFIGS.glob("deepspeed/*.json"):
        config = json.loads(path.read_text())
        assert set(config) == {"zero_optimization"}, path.name
        assert all(value != "auto" for _, value in leaves(config)), path.name


@pytest.mark.parametrize("path", files("**/*.yaml"))
def test_commands_in_comments_name_files_that_exist(path: Path):
    words = " ".join(
        line.lstrip("# ") for line in path.read_text().splitlines() if line.startswith("#")
    ).split()
    named = [word.strip("`.,:;()") for word in words if word.startswith("configs/")]
    for name in named:
        assert "X.yaml" in name or (ROOT / name).is_file(), name
