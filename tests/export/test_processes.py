"""Real processes: under accelerate launch, one of them killed, stopped; kills: test_kills.py."""

import json
import re
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from launch.workers import exit_code_of
from pipeline.common import strict
from pipeline.export.verify.levels import verify_export
from tests.export.world import NUM_SHARDS, make_config, make_data, make_run, tree


@pytest.fixture
def config(run_dir: Path, tmp_path: Path) -> Path:
    """The config file of an export to tmp_path/out."""
    path = tmp_path / "export.yaml"
    path.write_text(strict.dump(make_config(run_dir, tmp_path / "out")))
    return path


@pytest.mark.distributed
@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_under_accelerate_launch(
    config: Path, finished: Path, run_processes: Callable, num_processes: int
):
    result = run_processes("pipeline.export", num_processes, config)
    assert result.code == 0, result.output
    assert tree(config.parent / "out") == tree(finished)
    assert len(re.findall(r"^export: \d+ rows in ", result.output, re.MULTILINE)) == 1


@pytest.mark.distributed
def test_the_command_itself_starts_several(
    config: Path, finished: Path, tmp_path: Path, run_processes: Callable
):
    command = ("export", "run", config, "--processes", 2, "--device", "cpu")
    shown = run_processes("pipeline", None, *command, "--dry-run")
    assert shown.code == 0, shown.output
    assert "WORLD_SIZE=2" in shown.output
    assert f"\n# tasks: {NUM_SHARDS}\n" in shown.output
    planned = run_processes("pipeline", None, *command, "--dry-run", "--json").output
    assert json.loads(planned[planned.index("{") :])["tasks"] == NUM_SHARDS
    assert not (tmp_path / "out").exists()
    mistaken = run_processes("pipeline", None, *command, "dtpe=float16")
    assert mistaken.code == 2, mistaken.output
    assert mistaken.output.count("error: ") == 1, mistaken.output
    result = run_processes("pipeline", None, *command)
    assert result.code == 0, result.output
    assert tree(tmp_path / "out") == tree(finished)


@pytest.mark.parametrize(
    ("codes", "expected"),
    [([0, 0], 0), ([-9, 0], 0), ([3, 3], 3), ([2, 2], 2), ([-9, 3], 3), ([-9, 1], 1)],
)
def test_the_exit_code_of_several(codes: list[int], expected: int):
    """One process that ended well is enough: it has seen all tasks committed."""
    assert exit_code_of(codes) == expected


@pytest.mark.fault
def test_one_of_two_launched_processes_is_killed(
    run_dir: Path, finished: Path, tmp_path: Path, start_processes: Callable, config: Path
):
    """The launcher ends the other process; the same command in one process finishes."""
    launched = start_processes("pipeline.export", 2, config)
    while len(launched.ranks()) < 2:
        time.sleep(0.01)
    victim = launched.ranks()[1]
    while not (tmp_path / "out/_run/plan.json").exists() and launched.running:
        time.sleep(0.001)
    victim.kill()  # the same moment it begins its work
    assert launched.wait().code != 0
    alone = start_processes("pipeline.export", None, config).wait()
    assert alone.code == 0, alone.output
    assert tree(tmp_path / "out") == tree(finished)


@pytest.mark.fault
def test_sigterm_stops_between_tasks_and_the_same_command_goes_on(
    tmp_path: Path, start_processes: Callable, run_processes: Callable
):
    """Enough shards that the signal comes before the end."""
    data = make_data(tmp_path / "data", shards=150)
    run_dir = make_run(tmp_path / "run", data, {"bottleneck": {"kind": "gaussian", "size": 3}})
    config = tmp_path / "export.yaml"
    config.write_text(strict.dump(make_config(run_dir, tmp_path / "out")))
    commits = tmp_path / "out/_run/commits"
    running = start_processes("pipeline.export", None, config)
    while running.running and not (commits.exists() and any(commits.glob("*.json"))):
        time.sleep(0.001)
    psutil.Process(running.pid).terminate()
    stopped = running.wait()
    assert stopped.code == 3, stopped.output
    done = len(list(commits.glob("*.json")))
    assert 0 < done < 150
    assert not (tmp_path / "out/_SUCCESS").exists()
    resumed = run_processes("pipeline.export", None, config)
    assert resumed.code == 0, resumed.output
    assert verify_export(tmp_path / "out", source=data).problems == []


@pytest.mark.distributed
def test_wrong_use_is_told_once(config: Path, run_processes: Callable, tmp_path: Path):
    result = run_processes("pipeline.export", 2, config, f"run={tmp_path / 'none'}")
    assert result.code != 0
    assert result.output.count("is no run directory") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_progress_names_rate_and_share(config: Path, run_processes: Callable):
    result = run_processes("pipeline.export", None, config, "formats=[{kind: parquet}]")
    assert result.code == 0, result.output
    total = NUM_SHARDS * 16
    assert re.search(
        rf"export: {total} of {total} images \(100%\), [\d,]+/s, 0 s left", result.output
    )
