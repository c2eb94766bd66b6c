"""SIGKILL at random moments, restarts of another size, two exports at once: always the same bytes.

killer.py does the starts and the kills; here stands what must come of them.
"""

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import boto3
import pytest

from pipeline.common import strict
from pipeline.export.verify.levels import verify_export
from tests.data.storage.conftest import s3_endpoint
from tests.export.killer import KILLED, KINDS, SIZES
from tests.export.world import make_config, run_export, tree
from tests.processes import CPU_ENV, ROOT

__all__ = ["s3_endpoint"]  # a fixture

FORMATS = [{"kind": kind} for kind in ("tar", "parquet", "npy", "safetensors")]

pytestmark = [pytest.mark.fault, pytest.mark.timeout(3600)]


def counts(*, few: int, many: int, seeds: int) -> pytest.MarkDecorator:
    """(seed, kills): few for every lane, `many` of each of some seeds in `make soak`."""
    full = [pytest.param(seed, many, marks=pytest.mark.soak) for seed in range(1, seeds + 1)]
    return pytest.mark.parametrize(("seed", "kills"), [(0, few), *full])


@pytest.fixture(scope="module")
def undisturbed(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The tree of an export in all formats by this process."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    assert run_export(make_config(run_dir, out, formats=FORMATS)) == 0
    return tree(out)


def kill_and_restart(run_dir: Path, folder: Path, out: str, seed: int, kills: int) -> list[str]:
    """Run the killer, check that it killed, and return the folders of its exports."""
    config = folder / "export.yaml"
    config.write_text(strict.dump(make_config(run_dir, folder / "out", formats=FORMATS)))
    done = subprocess.run(
        [sys.executable, ROOT / "tests/export/killer.py", config, out, str(seed), str(kills)],
        env=os.environ | CPU_ENV,
        capture_output=True,
        text=True,
        check=False,
    )
    log = Path(f"{config}.log").read_text()[-3000:]
    assert done.returncode == 0, done.stderr + log
    result = json.loads(done.stdout)
    check_kills(result["starts"], kills, log)
    return result["places"]


def check_kills(starts: list[dict], kills: int, log: str) -> None:
    """Processes were killed or ended well; kills hit every phase, by every kind of start."""
    codes = [code for start in starts for of_size in start["codes"] for code in of_size]
    assert set(codes) == {0, KILLED}, log
    phases = Counter(phase for start in starts for phase in start["phases"])
    print(f"{phases.total()} kills of {codes.count(KILLED)} processes: {dict(phases)}")
    assert phases.total() >= kills
    assert {start["kind"] for start in starts if start["phases"]} == set(KINDS)
    assert set(starts[-1]["codes"][0]) == {0}
    sizes = [size for start in starts for size in start["sizes"]]
    assert all(one != next_one for one, next_one in pairwise(sizes))
    if kills >= 15:
        assert set(sizes) == set(SIZES)
        assert phases["before"]
        assert phases["finalize"]
        assert phases["publish"] + phases["between"]


@counts(few=10, many=50, seeds=4)
def test_killed_exports_have_the_same_bytes(
    run_dir: Path, data: Path, undisturbed: dict[str, str], tmp_path: Path, seed: int, kills: int
):
    for place in kill_and_restart(run_dir, tmp_path, str(tmp_path / "killed"), seed, kills):
        assert tree(Path(place)) == undisturbed
        assert verify_export(place, source=data).problems == []


def remote_tree(url: str) -> dict[str, str]:
    """`tree` of an export in a bucket, read by nothing of ours."""
    bucket, prefix = url.removeprefix("s3://").split("/", 1)
    found = boto3.resource("s3").Bucket(bucket).objects.filter(Prefix=f"{prefix}/")
    contents = {item.key[len(prefix) + 1 :]: item.get()["Body"].read() for item in found}
    return {
        name: hashlib.sha256(content).hexdigest()
        for name, content in contents.items()
        if not name.startswith("_run/")
    }


@counts(few=3, many=15, seeds=2)
def test_killed_exports_to_s3_have_the_same_bytes(
    s3_endpoint: str,
    run_dir: Path,
    undisturbed: dict[str, str],
    tmp_path: Path,
    seed: int,
    kills: int,
):
    """The store keeps running; uploads, conditional puts and copies are killed."""
    url = f"s3://bucket/killed-{seed}"
    for place in kill_and_restart(run_dir, tmp_path, url, seed, kills):
        assert remote_tree(place) == undisturbed
        assert verify_export(place).problems == []
