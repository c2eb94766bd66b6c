"""max_bad_fraction: of small shards, of an export as a whole, of exports by former versions."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.common.errors import DONE, WRONG_USE, UserError
from pipeline.data.settings import MIN_SAMPLES_JUDGED
from pipeline.export.__main__ import main
from pipeline.export.status import export_status, finalize_export
from tests.export.foreign import picture, write_shards
from tests.export.world import make_config, run_export

ROWS = 8


def shards_of(folder: Path, bad: dict[int, int], *, shards: int = 3, rows: int = ROWS) -> Path:
    """Small shards; bad: number of broken pictures by shard."""
    whole = picture(7)
    return write_shards(
        folder,
        {
            f"{shard}.tar": {
                f"{shard}{i:03d}.png": whole[:60] if i < bad.get(shard, 0) else whole
                for i in range(rows)
            }
            for shard in range(shards)
        },
    )


def committed(out: Path) -> dict[str, int]:
    """Time of each commit record by name: a task that is done again has another."""
    return {path.stem: path.stat().st_mtime_ns for path in (out / "_run/commits").iterdir()}


@pytest.fixture
def export(run_dir: Path, tmp_path: Path) -> Callable[..., int]:
    """Export the data in tmp_path/data to tmp_path/out."""

    def run(*, retry_failed: bool = False, **settings: object) -> int:
        data = {"path": str(tmp_path / "data")}
        config = make_config(run_dir, tmp_path / "out", data=data, **settings)
        return run_export(config, retry_failed=retry_failed)

    return run


@pytest.mark.parametrize(
    "bad",
    [{1: 1}, {0: 1, 2: 1}, {1: 2}, {2: 2}],
    ids=["one", "one in each of two", "two in one", "two in the last"],
)
def test_small_shards_with_broken_pictures_are_exported(
    tmp_path: Path, export: Callable[..., int], capsys: pytest.CaptureFixture, bad: dict[int, int]
):
    """1 of 8 is more than a tenth, 1 of 24 is not: the whole is judged."""
    shards_of(tmp_path / "data", bad)
    assert export() == DONE
    manifest = json.loads((tmp_path / "out/manifest.json").read_bytes())
    num_bad = sum(bad.values())
    assert (manifest["rows"], manifest["failed_rows"]) == (3 * ROWS, num_bad)
    assert f"{num_bad} of them cannot be used, zeros in their place" in capsys.readouterr().err
    assert export_status(str(tmp_path / "out")).failed_rows == num_bad


def test_of_a_large_shard_too_many_are_rejected_at_once(tmp_path: Path, export: Callable[..., int]):
    """A task of MIN_SAMPLES_JUDGED rows or more is judged by its own."""
    shards_of(tmp_path / "data", {0: 101}, shards=1, rows=MIN_SAMPLES_JUDGED)
    with pytest.raises(UserError, match=r"101 of the 1000 rows of 0 failed, more than .* = 0\.1"):
        export()
    assert not list((tmp_path / "out").glob("_run/commits/*"))


def test_half_of_each_shard_is_rubbish(tmp_path: Path, export: Callable[..., int]):
    """No task is rejected, but the whole is, until the setting allows it; nothing is done again."""
    out = tmp_path / "out"
    shards_of(tmp_path / "data", dict.fromkeys(range(3), 4))
    told = (
        r"12 of its 24 rows failed, more than max_bad_fraction = 0\.1 allows\. The first: \(0, '00"
    )
    for _ in range(2):
        with pytest.raises(UserError, match=told):
            export()
    with pytest.raises(UserError, match=told):
        finalize_export(str(out))
    assert not (out / "_SUCCESS").exists()
    status = export_status(str(out))
    assert (status.finished, status.committed_tasks, status.quarantined) == (False, 3, {})
    assert status.lines()[0].startswith("FAILED  3 of 3 tasks committed, but 12 of its 24 rows")
    before = committed(out)
    with pytest.raises(UserError, match=r"max_bad_fraction = 0\.4 allows"):
        export(max_bad_fraction=0.4)
    assert export(max_bad_fraction=0.5) == DONE
    assert committed(out) == before
    assert export_status(str(out)).lines()[0].startswith("OK  finished")


def test_half_of_the_shards_are_rubbish(tmp_path: Path, export: Callable[..., int]):
    """A task without a row that can be used is rejected, however few rows it has."""
    shards_of(tmp_path / "data", {0: ROWS, 2: ROWS}, shards=4)
    for fraction in (0.1, 0.5, 0.99):
        with pytest.raises(UserError, match="2 of 4 tasks have failed.* 8 of the 8 rows of 0"):
            export(max_bad_fraction=fraction, retry_failed=True)
    assert set(committed(tmp_path / "out")) == {"1", "3"}
    assert export(max_bad_fraction=1, retry_failed=True) == DONE


def test_a_bound_of_zero_lets_no_bad_row_pass(tmp_path: Path, export: Callable[..., int]):
    shards_of(tmp_path / "data", {1: 1})
    with pytest.raises(UserError, match="1 of the 8 rows of 1 failed"):
        export(max_bad_fraction=0)


def test_what_former_versions_rejected_is_accepted_when_it_is_tried_again(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    """Their records of commits name no bound, those of failures are like today's."""
    shards_of(tmp_path / "data", {1: 1})
    config, out = tmp_path / "export.yaml", tmp_path / "out"
    config.write_text(f"run: {run_dir}\nout: {out}\ndata: {{path: {tmp_path / 'data'}}}\n")
    argv = [str(config), "--worker", "0/1"]
    assert main([*argv, "max_bad_fraction=0"]) == WRONG_USE
    for path in (out / "_run/commits").iterdir():
        record = json.loads(path.read_bytes())
        del record["max_bad_fraction"], record["left_out"]
        path.write_text(json.dumps(record))
    assert main(argv) == WRONG_USE
    assert "--retry-failed" in capsys.readouterr().err
    assert main([*argv, "--retry-failed"]) == DONE


def test_a_finished_export_is_not_judged_again(tmp_path: Path, export: Callable[..., int]):
    shards_of(tmp_path / "data", {1: 2})
    assert export(max_bad_fraction=0.2) == DONE
    assert export(max_bad_fraction=0) == DONE
    assert finalize_export(str(tmp_path / "out")).rows == 3 * ROWS
