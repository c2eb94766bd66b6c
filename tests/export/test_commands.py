"""`latentmill export ...` and `verify` as a person or a script calls them, on a disk and on S3."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.__main__ import main
from pipeline.common.errors import DONE, FAILED, PREEMPTED, WRONG_USE
from pipeline.data.storage.opening import open_writable
from pipeline.export.command import begin, work_through
from pipeline.export.workers import Worker
from tests.data.storage.conftest import BUCKET, no_proxy, s3_endpoint
from tests.export.test_commit import stage_task
from tests.export.world import NUM_SHARDS, SHARD_ROWS, make_config
from tests.processes import CPU_ENV, ROOT

__all__ = ["no_proxy", "s3_endpoint"]  # fixtures

ROWS = NUM_SHARDS * SHARD_ROWS
LIGHT = ("status", "finalize", "gc")  # of the verbs, those that need no torch


Call = Callable[..., tuple[int, Any, str]]  # code, JSON on stdout or None, last line on stderr


WAYS = (
    ("disk", "here"),
    ("s3", "here"),
    pytest.param("disk", "processes", marks=pytest.mark.slow),
    pytest.param("s3", "processes", marks=pytest.mark.soak),
)


@pytest.fixture
def latentmill(
    request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Call:
    """The command line, within this process or as one for each call."""
    (tmp_path / "without").mkdir()
    (tmp_path / "without/torch.py").write_text("raise ModuleNotFoundError('no torch here')\n")

    def start(argv: list[str]) -> tuple[int, str, str]:
        path = [str(tmp_path / "without")] if argv[1] in LIGHT else []
        done = subprocess.run(
            [sys.executable, "-m", "pipeline", *argv],
            env=os.environ | CPU_ENV | {"PYTHONPATH": os.pathsep.join([*path, str(ROOT)])},
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout, done.stderr

    def call(*arguments: str | Path) -> tuple[int, Any, str]:
        argv = [str(argument) for argument in arguments]
        if request.param == "processes":
            code, out, err = start(argv)
        else:
            code = main(argv)
            out, err = capsys.readouterr()
        assert "Traceback" not in err, err
        said = err.strip().splitlines()
        return code, json.loads(out or "null"), said[-1] if said else ""

    return call


@pytest.fixture
def out(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where the export goes."""
    if request.param == "disk":
        return str(tmp_path / "out")
    request.getfixturevalue("s3_endpoint")
    return f"s3://{BUCKET}/{tmp_path.name}/out"


@pytest.mark.parametrize(("out", "latentmill"), WAYS, indirect=True)
def test_from_the_plan_to_the_checked_export(
    run_dir: Path, data: Path, tmp_path: Path, out: str, latentmill: Call
):
    store = open_writable(out)
    config = tmp_path / "export.yaml"
    settings = "batch_size: 6\nformats: [{kind: tar}, {kind: parquet}]\n"
    config.write_text(f"run: {run_dir}\nout: {out}\n{settings}")

    code, _, said = latentmill("export", "status", out)
    assert (code, said[: 7 + len(out)]) == (WRONG_USE, f"error: {out}")

    code, plan, _ = latentmill("export", "plan", config, "--json")
    assert code == DONE
    assert (plan["out"], plan["tasks"], plan["rows"]) == (out, NUM_SHARDS, ROWS)
    assert (plan["fields"], plan["latent_shape"]) == (["mu", "logvar"], [3])
    assert (plan["dtype"], plan["latent_bytes"]) == ("float32", ROWS * 2 * 3 * 4)
    assert ("If-None-Match" if out.startswith("s3") else "hard links") in plan["each_task_once_by"]

    code, status, _ = latentmill("export", "status", out, "--json")
    assert (code, status["finished"], status["rows"]) == (DONE, False, ROWS)
    assert (status["committed_tasks"], status["rows_per_process_second"]) == (0, None)
    code, _, said = latentmill("export", "finalize", out)
    assert code == WRONG_USE
    assert f"{NUM_SHARDS} of its {NUM_SHARDS} tasks are not committed, such as shard-000000" in said
    code, report, _ = latentmill("verify", out, "--json")
    assert code == FAILED
    assert f"0 of {NUM_SHARDS} tasks are committed" in report["problems"][0]

    prepared, _ = begin(make_config(run_dir, out), Worker())
    stops = iter([False] * 6 + [True])
    assert work_through(prepared, Worker(), lambda: next(stops)) == PREEMPTED
    litter = stage_task(prepared, 0)
    code, report, _ = latentmill("export", "gc", out, "--json")
    assert (code, report["removed_files"]) == (DONE, len(litter.files))
    assert report["removed_bytes"] == sum(file.bytes for file in litter.files)
    code, status, _ = latentmill("export", "status", out, "--json")
    assert (status["committed_tasks"], status["committed_rows"]) == (2, 2 * SHARD_ROWS)

    code, nothing, said = latentmill("export", "run", config, "--worker", "1/2")
    assert (code, nothing) == (DONE, None), said
    code, status, _ = latentmill("export", "status", out, "--json")
    assert (status["finished"], status["committed_tasks"]) == (True, NUM_SHARDS)
    assert (status["committed_rows"], status["failed_rows"]) == (ROWS, 0)
    assert status["quarantined"] == {}
    assert status["rows_per_process_second"] > 0
    assert latentmill("export", "finalize", out, "--json")[:2] == (
        DONE,
        {"out": out, "tasks": NUM_SHARDS, "rows": ROWS},
    )

    code, report, _ = latentmill("verify", out, "--source", data, "--json")
    assert (code, report["problems"], report["rows"]) == (DONE, [], ROWS)
    code, _, said = latentmill("export", "plan", config, "batch_size=7")
    assert code == WRONG_USE
    name = "data/tar/shard-000001.tar"
    content = bytearray(store.read(name) or b"")
    content[700] ^= 1
    store.put(name, bytes(content))
    code, report, _ = latentmill("verify", out, "--json", "--level", "hashes")
    assert (code, report["problems"]) == (
        FAILED,
        [f"{name} has other content than was committed (sha256)"],
    )
