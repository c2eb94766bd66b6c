"""verify finds every kind of damage, and no problem in a good export."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipeline.common.errors import DONE, UserError
from pipeline.data.index import Index, build_index
from pipeline.data.pack.pack import pack
from pipeline.data.pack.sources import Sprites
from pipeline.export import statistics
from pipeline.export.command import begin, work_through
from pipeline.export.commit import keys_digest
from pipeline.export.finalize import Keys
from pipeline.export.statistics import partial_of
from pipeline.export.status import export_status
from pipeline.export.verify.levels import LEVELS, verify_export
from pipeline.export.workers import Worker
from pipeline.latents.formats.writers import BaseWriter, ParquetWriter, Rows, TarWriter
from tests.export.world import NUM_SHARDS, SHARD_ROWS, make_config, make_data, run_export

TAR = "data/tar/shard-000002.tar"
PARQUET = "data/parquet/shard-000002.parquet"


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    """A copy of a good export, to be damaged."""
    shutil.copytree(finished, tmp_path / "out")
    return tmp_path / "out"


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def seal(out: Path) -> None:
    """Make hashes and sizes fit again, as someone would who edits the manifest by hand."""
    path = out / "manifest.json"
    manifest = json.loads(path.read_bytes())
    for file in [f for task in manifest["tasks"] for f in task["files"]]:
        content = (out / file["path"]).read_bytes()
        file["bytes"], file["sha256"] = len(content), hashlib.sha256(content).hexdigest()
    for name in ("statistics", "keys"):
        content = (out / manifest[name]["path"]).read_bytes()
        manifest[name]["sha256"] = hashlib.sha256(content).hexdigest()
    path.write_text(json.dumps(manifest))
    (out / "_SUCCESS").write_text(hashlib.sha256(path.read_bytes()).hexdigest() + "\n")
    shutil.rmtree(out / "_run", ignore_errors=True)


def rewrite(out: Path, change: Callable[[Rows], Rows]) -> None:
    """Replace both files of a task by changed ones."""
    for writer, name in ((TarWriter(), TAR), (ParquetWriter(), PARQUET)):
        rewrite_with(writer, out / name, change)


def rewrite_with(writer: BaseWriter, path: Path, change: Callable[[Rows], Rows]) -> None:
    """Replace one format's files of a task by changed ones."""
    rows = change(writer.read(path))
    for suffix in writer.suffixes:
        path.with_suffix(suffix).unlink()
    writer.write(path, rows)


def changed(rows: Rows, **fields) -> Rows:
    return Rows(**vars(rows) | fields)


@pytest.mark.parametrize("level", LEVELS)
def test_good_export_has_no_problem(finished: Path, data: Path, level: str):
    report = verify_export(finished, source=data, level=level)
    assert report.problems == []
    assert report.ok
    assert (report.rows, report.failed_rows) == (NUM_SHARDS * SHARD_ROWS, 0)
    assert report.files == 2 * NUM_SHARDS + 2
    assert report.notes == []


def test_without_source_the_report_says_so(finished: Path):
    report = verify_export(finished)
    assert report.ok
    assert len(report.notes) == 1


def test_copy_without_run_records_is_good(out: Path, data: Path):
    shutil.rmtree(out / "_run")
    assert verify_export(out, source=data).problems == []


@pytest.mark.parametrize(
    "name", [TAR, PARQUET, "manifest.json", "latent_stats.json", "keys.parquet", "_SUCCESS"]
)
def test_one_flipped_bit(out: Path, name: str):
    flip_bit(out / name)
    problems = verify_export(out).problems
    expected = "manifest.json" if name == "_SUCCESS" else name
    assert any(expected in problem for problem in problems)


@pytest.mark.parametrize("name", [TAR, PARQUET, "latent_stats.json", "keys.parquet"])
@pytest.mark.parametrize("level", ["listing", "statistics"])
def test_missing_file(out: Path, name: str, level: str):
    (out / name).unlink()
    assert f"{name} is missing" in verify_export(out, level=level).problems


@pytest.mark.parametrize("name", ["data/tar/extra.tar", "notes.txt", "_stage/x/tar.tar"])
def test_extra_file(out: Path, name: str):
    (out / name).parent.mkdir(parents=True, exist_ok=True)
    (out / name).touch()
    assert verify_export(out, level="listing").problems == [f"{name} is not of this export"]


def test_truncated_file(out: Path):
    content = (out / TAR).read_bytes()
    (out / TAR).write_bytes(content[:-512])
    (problem,) = verify_export(out, level="listing").problems
    assert problem.startswith(f"{TAR} has {len(content) - 512} bytes")


def test_swapped_rows_behind_fitting_hashes(out: Path, data: Path):
    def swap(rows: Rows) -> Rows:
        keys = list(rows.keys)
        keys[3], keys[4] = keys[4], keys[3]
        return changed(rows, keys=keys)

    rewrite(out, swap)
    seal(out)
    problems = verify_export(out, source=data).problems
    assert any(f"{TAR}: other keys, or in another order, than {data}" in p for p in problems)
    assert any(f"{PARQUET}: other keys, or in another order, than was" in p for p in problems)
    assert any("keys.parquet differs" in p for p in problems)


def test_changed_latents_behind_fitting_hashes(out: Path):
    def nudge(rows: Rows) -> Rows:
        mu = rows.latents["mu"].copy()
        mu[0, 0] = np.nextafter(mu[0, 0], np.float32(9))
        return changed(rows, latents={**rows.latents, "mu": mu})

    rewrite(out, nudge)
    seal(out)
    assert verify_export(out, level="keys").problems == []
    assert verify_export(out).problems == [
        "latent_stats.json differs from the statistics of the stored values",
        "manifest.json holds another scaling than that of the stored values",
    ]


def test_formats_that_differ_behind_fitting_hashes(out: Path):
    rows = TarWriter().read(out / TAR)
    (out / TAR).unlink()
    TarWriter().write(out / TAR, changed(rows, labels=rows.labels + 1))
    seal(out)
    assert f"{PARQUET} holds other rows than {TAR}" in verify_export(out).problems


def test_failed_row_that_is_not_listed(out: Path):
    def fail(rows: Rows) -> Rows:
        valid = rows.valid.copy()
        valid[7] = False
        return changed(rows, valid=valid)

    rewrite(out, fail)
    seal(out)
    assert any("not the failed rows" in problem for problem in verify_export(out).problems)


def test_wrong_statistics_behind_fitting_hashes(out: Path):
    partials = []
    for path in sorted((out / "data/parquet").iterdir())[1:]:  # all but one shard
        rows = ParquetWriter().read(path)
        partials.append(partial_of(rows.latents, rows.valid))
    (out / "latent_stats.json").write_bytes(statistics.to_text(statistics.merge(partials)))
    seal(out)
    assert verify_export(out).problems == [
        "latent_stats.json differs from the statistics of the stored values"
    ]


def test_statistics_have_the_same_bits_when_recomputed(finished: Path):
    partials = []
    for path in sorted((finished / "data/tar").iterdir()):
        rows = TarWriter().read(path)
        partials.append(partial_of(rows.latents, rows.valid))
    text = statistics.to_text(statistics.merge(partials))
    assert (finished / "latent_stats.json").read_bytes() == text


def test_unfinished_export(run_dir: Path, data: Path, tmp_path: Path):
    stops = iter([False] * 6 + [True])  # asked before each of a task's three batches
    prepared, _ = begin(make_config(run_dir, tmp_path), Worker())
    assert work_through(prepared, Worker(), lambda: next(stops)) == 3
    (problem,) = verify_export(tmp_path, source=data).problems
    assert f"2 of {NUM_SHARDS} tasks are committed" in problem


def test_manifest_of_other_counts(out: Path):
    manifest = json.loads((out / "manifest.json").read_bytes())
    manifest["tasks"][1]["rows"] -= 1
    (out / "manifest.json").write_text(json.dumps(manifest))
    problems = verify_export(out, level="counts").problems
    assert "_SUCCESS does not hold the hash of manifest.json: one of them was changed" in problems
    assert f"shard-000001: {SHARD_ROWS - 1} rows, but {SHARD_ROWS} were planned" in problems
    assert "shard-000001: manifest.json and the commit record differ" in problems


@pytest.mark.parametrize("seed", range(4))
def test_a_manifest_with_a_flipped_bit_never_ends_the_check(out: Path, data: Path, seed: int):
    """Wherever the flipped bit is, also in names and settings, problems are listed."""
    path, rng = out / "manifest.json", np.random.default_rng(seed)
    content = path.read_bytes()
    texts = [b'"rows"', b'"path"', b'"tar"', b'"all"', b'"mu"', b'"files"', b'"fingerprint"']
    starts = [content.index(text) + 1 for text in texts]
    for place in (starts, rng.integers(0, len(content), 8).tolist())[seed % 2]:
        damaged = bytearray(content)
        damaged[place] ^= 1 << int(rng.integers(0, 7))
        path.write_bytes(damaged)
        problems = verify_export(out, source=data).problems
        assert any("manifest.json" in problem for problem in problems), place


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: [manifest],
        lambda manifest: manifest | {"tasks": {}},
        lambda manifest: manifest | {"rows": "many"},
        lambda manifest: manifest | {"fingerprint": {}},
        lambda manifest: {k: v for k, v in manifest.items() if k != "keys"},
    ],
)
def test_a_manifest_that_is_none(out: Path, change: Callable):
    path = out / "manifest.json"
    path.write_text(json.dumps(change(json.loads(path.read_bytes()))))
    assert any("manifest.json" in problem for problem in verify_export(out).problems)


@pytest.fixture(scope="module")
def twice(tmp_path_factory: pytest.TempPathFactory, run_dir: Path) -> tuple[Path, Path]:
    """A data set whose third shard is a copy of its first, and its export."""
    folder = tmp_path_factory.mktemp("twice")
    data = make_data(folder / "data", shards=2)
    shutil.copy(data / "shard-000000.tar", data / "shard-000002.tar")
    build_index(data)
    assert run_export(make_config(run_dir, folder / "out", data={"path": str(data)})) == 0
    return data, folder / "out"


@pytest.mark.parametrize("level", ["keys", "statistics"])
def test_keys_that_the_source_holds_twice_are_a_note(twice: tuple[Path, Path], level: str):
    data, out = twice
    assert json.loads((out / "manifest.json").read_bytes())["duplicate_keys"] == SHARD_ROWS
    report = verify_export(out, source=data, level=level)
    assert report.problems == []
    assert report.notes == [f"{SHARD_ROWS} rows have the key of an earlier one"]


@pytest.mark.parametrize("level", ["keys", "statistics"])
def test_duplicate_keys_that_are_not_counted(twice: tuple[Path, Path], tmp_path: Path, level: str):
    """All hashes fit; only the number in the manifest is wrong."""
    data, out = twice[0], Path(shutil.copytree(twice[1], tmp_path / "out"))
    path = out / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {"duplicate_keys": 0}))
    seal(out)
    assert verify_export(out, source=data, level="hashes").problems == []
    expected = f"manifest.json counts 0 duplicate keys, but the files hold {SHARD_ROWS}"
    assert verify_export(out, source=data, level=level).problems == [expected]


def test_a_key_that_took_the_place_of_another(out: Path, data: Path):
    """In files, key index and all hashes: a row of one task has the key of another's."""

    def repeat(rows: Rows) -> Rows:
        return changed(rows, keys=["000000000", *rows.keys[1:]])

    rewrite(out, repeat)
    manifest = json.loads((out / "manifest.json").read_bytes())
    keys = [TarWriter().read(path).keys for path in sorted((out / "data/tar").iterdir())]
    manifest["tasks"][2]["keys_sha256"] = keys_digest(keys[2])
    (out / "manifest.json").write_text(json.dumps(manifest))
    names = [task["name"] for task in manifest["tasks"]]
    (out / "keys.parquet").write_bytes(Keys(keys).file(names))
    seal(out)
    assert verify_export(out).problems == [
        "manifest.json counts 0 duplicate keys, but the files hold 1"
    ]
    problems = verify_export(out, source=data).problems
    assert any(f"{TAR}: other keys, or in another order, than {data}" in p for p in problems)


def test_a_missing_and_an_extra_task(out: Path, data: Path):
    """The manifest lacks a shard: its files are superfluous, its rows are missing."""
    path = out / "manifest.json"
    manifest = json.loads(path.read_bytes())
    gone = manifest["tasks"].pop(2)
    manifest["rows"] -= gone["rows"]
    path.write_text(json.dumps(manifest))
    problems = verify_export(out, source=data).problems
    assert f"{TAR} is not of this export" in problems
    assert "manifest.json lists other tasks than _run/plan.json" in problems
    for file in gone["files"]:
        (out / file["path"]).unlink()
    seal(out)
    problems = verify_export(out, source=data).problems
    assert f"{data}/shard-000002.tar has {SHARD_ROWS} rows of split all, but no task" in problems


def test_latents_of_another_shape(out: Path):
    """The files agree with each other, but not with the manifest."""

    def cut(rows: Rows) -> Rows:
        return changed(rows, latents={"mu": rows.latents["mu"][:, :2]})

    rewrite(out, cut)
    seal(out)
    problems = verify_export(out).problems
    for name in (TAR, PARQUET):
        assert f"{name}: no mu of the shape (3,)" in problems
        assert f"{name}: no logvar of the shape (3,)" in problems


def test_latents_that_are_not_finite(out: Path):
    def spoil(rows: Rows) -> Rows:
        mu = rows.latents["mu"].copy()
        mu[:3, 1] = np.inf, -np.inf, np.nan
        return changed(rows, latents={**rows.latents, "mu": mu})

    rewrite(out, spoil)
    seal(out)
    problems = verify_export(out).problems
    assert {f"{name}: latents that are not finite" for name in (TAR, PARQUET)} < set(problems)


def test_missing_commit_record(out: Path):
    (out / "_run/commits/shard-000000.json").unlink()
    (problem,) = verify_export(out).problems
    assert problem.startswith("shard-000000: its commit record cannot be read")


@pytest.mark.parametrize("content", [b'{"format": "latentmill-expo', b"[]", b"{}"])
def test_a_damaged_plan_is_a_problem_among_others(out: Path, content: bytes):
    (out / "_run/plan.json").write_bytes(content)
    (problem,) = verify_export(out).problems
    assert problem.startswith(f"{out}/_run/plan.json ")
    (out / "manifest.json").unlink()
    assert len(verify_export(out).problems) == 2
    with pytest.raises(UserError, match="plan.json"):
        export_status(out)


def test_a_damaged_commit_record_is_named(out: Path):
    path = out / "_run/commits/shard-000003.json"
    path.write_bytes(path.read_bytes()[:100])
    (problem,) = verify_export(out).problems
    assert problem.startswith("shard-000003: its commit record cannot be read")
    with pytest.raises(UserError, match=r"shard-000003.json is damaged .* remove it"):
        export_status(out)


def test_another_source(finished: Path, tmp_path: Path):
    pack(Sprites(count=32, seed=9, shard_samples=SHARD_ROWS), tmp_path / "other")
    (problem,) = verify_export(finished, source=tmp_path / "other").problems
    assert problem == f"the source {tmp_path / 'other'} is another data set (dataset_id)"


def test_split_is_checked_against_the_source(run_dir: Path, data: Path, tmp_path: Path):
    assert run_export(make_config(run_dir, tmp_path, data={"split": "held_out"})) == 0
    assert verify_export(tmp_path, source=data).problems == []
    manifest = json.loads((tmp_path / "manifest.json").read_bytes())
    manifest["fingerprint"]["data"]["split"] = "all"
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    problems = verify_export(tmp_path, source=data, level="keys").problems
    assert any("not the rows of split all" in problem for problem in problems)


def test_every_problem_is_listed(out: Path):
    flip_bit(out / TAR)
    (out / PARQUET).unlink()
    (out / "extra").touch()
    problems = "\n".join(verify_export(out).problems)
    for text in (f"{TAR} has other content", f"{PARQUET} is missing", "extra is not of"):
        assert text in problems


def test_no_export_is_wrong_use(tmp_path: Path):
    with pytest.raises(UserError, match="holds no export"):
        verify_export(tmp_path)


def test_unknown_level_is_wrong_use(finished: Path):
    with pytest.raises(UserError, match="level is 'all'"):
        verify_export(finished, level="all")


def test_the_shards_of_a_pattern_are_exported_and_verified(
    run_dir: Path, data: Path, tmp_path: Path
):
    out, names = tmp_path / "out", [shard.name for shard in Index.open(data).shards]
    config = make_config(run_dir, out, data={"split": f"{{{names[0]},{names[1]}}}"})
    assert run_export(config) == DONE
    assert {path.name.split(".")[0] for path in out.rglob("*.tar")} == {
        name.removesuffix(".tar") for name in names[:2]
    }
    assert verify_export(out, source=data).problems == []
