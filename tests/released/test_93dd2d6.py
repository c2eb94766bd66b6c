"""What commit 93dd2d6 wrote stays readable: an index, a run, an export in four formats, a model.

`93dd2d6/` holds them, and in expected.json what that code itself said of them; its README says how
they were made. What is only read must be equal, bit for bit. What is computed anew (losses,
metrics, latents) depends on the processor and the versions of libraries, so it must be equal within
RTOL, as the golden losses, on every machine. Bytes that follow from the versions in the export's
plan alone, without arithmetic of a model, are compared where these versions are installed; where
others are, what the bytes hold.

Each test has a copy of its own, made as git makes one: without times, owners and modes.
"""

import hashlib
import json
import shutil
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from pydantic import TypeAdapter

from pipeline.checkpoints.folder import list_checkpoints, read_state
from pipeline.common.files import sha256_file
from pipeline.config import read_config
from pipeline.data.index import build_index
from pipeline.data.index.reader import Index
from pipeline.data.index.verify import verify_shards
from pipeline.data.stream.datasets import open_indexes
from pipeline.export.status import export_status, finalize_export
from pipeline.export.verify.levels import LEVELS, verify_export
from pipeline.export.verify.reencode import verify_with_run
from pipeline.latents import LatentDataset
from pipeline.latents.formats.writers import Rows, Writer
from pipeline.train import main as train
from pipeline.training.build import make_order
from pipeline.training.loading import load_config, load_run
from tests.processes import ROOT
from tests.released.make_93dd2d6 import (
    BAD,
    COMPUTED,
    FORMATS,
    NUM_STEPS,
    RESUMED_STEPS,
    SHARDS,
    index_of,
    logged,
    mix,
    model_of,
    norms_of,
    order,
    rows_of,
    say,
)

WRITTEN = ROOT / "tests" / "released" / "93dd2d6"
EXPECTED = json.loads((WRITTEN / "expected.json").read_text())
RTOL = 1e-3
NUM_SAMPLES = sum(SHARDS)

each_format = pytest.mark.parametrize("kind", FORMATS)


@pytest.fixture(autouse=True)
def copy(tmp_path, monkeypatch):
    """The current directory: a copy of all that was written, at another place."""
    place = tmp_path / "copy"
    shutil.copytree(WRITTEN, place, copy_function=shutil.copyfile)
    monkeypatch.chdir(place)


def as_json(value):
    return json.loads(json.dumps(value))


def read_json(path):
    return json.loads(Path(path).read_bytes())


def assert_close(found, expected):
    """Numbers by name, or by step and name; today's code may log more of them."""
    assert found.keys() >= expected.keys()
    for name, value in expected.items():
        if isinstance(value, dict):
            assert_close(found[name], value)
        else:
            assert found[name] == pytest.approx(value, rel=RTOL), name


# The data: index and order.


def test_the_index_says_the_same_of_every_sample():
    assert as_json(index_of("data")) == EXPECTED["index"]
    assert verify_shards("data").problems == []


def test_the_shards_indexed_again_give_the_same_index():
    split = Index.open("data").split_spec
    manifest = read_json("data/index/manifest.json")
    shutil.rmtree("data/index")
    build_index("data", split=split, deep=True)
    assert read_json("data/index/manifest.json") == manifest
    assert as_json(index_of("data")) == EXPECTED["index"]


def test_every_process_reads_the_same_samples_in_the_same_order():
    steps = ("--steps", f"0:{RESUMED_STEPS}", "--world-size", "2")
    assert order("train.yaml", *steps) == EXPECTED["order"]
    assert order("run/config.yaml", *steps) == EXPECTED["order"]
    of_index = ("--batch-size", "6", "--seed", "5", "--split", "held_out", "--steps", "0:3")
    assert order("data", *of_index) == EXPECTED["order_of_index"]
    config = read_config(Path("train.yaml"))
    assert make_order(config, open_indexes(config.data)).order_id == EXPECTED["order_id"]


# The run: config, weights, and how it goes on.


def test_the_config_of_the_run_is_the_one_that_was_given():
    written, given = load_config(Path("run")), read_config(Path("train.yaml"))
    # It names no version: it is read by that of the run.
    assert written.resolved() == given.resolved()
    assert written.version == 1


@pytest.mark.parametrize("weights", ["raw", "ema"])
@pytest.mark.parametrize("step", [None, "best", NUM_STEPS])
def test_the_checkpoint_gives_the_same_weights(weights, step):
    run = load_run(Path("run"), step=step, weights=weights)
    assert run.weights_sha256 == EXPECTED["weights_sha256"][weights]
    assert (run.step, run.state.order_id) == (NUM_STEPS, EXPECTED["order_id"])


def test_the_checkpoint_evaluates_to_the_same_metrics():
    found = json.loads(say("evaluate", "run", "--step", "best", "--json"))
    assert_close(found, EXPECTED["evaluation"])
    found = json.loads(say("evaluate", "run", "--split", "train", "--json"))
    assert_close(found, EXPECTED["evaluation_of_train"])


def test_the_run_goes_on_as_it_would_have():
    metrics, bad = Path("run/metrics.jsonl").read_bytes(), Path("run/quarantine.jsonl").read_bytes()
    assert train(["train.yaml", f"num_steps={RESUMED_STEPS}"]) == 0
    found = logged(Path("run"), *COMPUTED)
    further = {step: values for step, values in found.items() if int(step) > NUM_STEPS}
    assert [int(step) for step in further] == list(range(NUM_STEPS + 1, RESUMED_STEPS + 1))
    assert_close(further, EXPECTED["resumed"]["logged"])
    assert Path("run/metrics.jsonl").read_bytes().startswith(metrics)
    assert Path("run/quarantine.jsonl").read_bytes() == bad
    assert not Path("run/changes.jsonl").exists()
    newest, oldest = list_checkpoints(Path("run/checkpoints"))
    assert (newest.name, oldest.name) == (f"step-{RESUMED_STEPS}", f"step-{NUM_STEPS}")
    assert_close(norms_of(newest), EXPECTED["resumed"]["norms"])
    assert read_state(newest).order_id == EXPECTED["order_id"]


def test_the_same_command_in_another_directory_gives_the_same_run():
    assert train(["train.yaml", "run_dir=another"]) == 0
    expected = logged(Path("run"), *COMPUTED)
    assert [int(step) for step in expected] == list(range(NUM_STEPS + 1))
    assert_close(logged(Path("another"), *COMPUTED), expected)


def test_a_mixture_is_read_in_the_same_order_and_learnt_from_alike():
    found = mix("mixed")
    assert found["order"] == EXPECTED["mixture"]["order"]
    assert_close(found["logged"], EXPECTED["mixture"]["logged"])


# The export: rows, proofs, and the work of others that is finished.


@each_format
def test_the_rows_of_an_export_are_read_as_they_were(kind):
    assert rows_of("export", kind) == EXPECTED["rows"][kind]


@each_format
def test_rows_that_are_read_and_written_again_are_the_same_files(kind, tmp_path):
    writer = TypeAdapter(Writer).validate_python({"kind": kind})
    versions = read_json("export/manifest.json")["fingerprint"]["versions"]
    has_versions = all(version(name) == versions[name] for name in versions if name != "code")
    for shard in range(len(SHARDS)):
        name = f"{shard:02d}"
        rows = writer.read(Path(f"export/data/{kind}/{name}{writer.suffix}"))
        writer.write(tmp_path / f"{name}{writer.suffix}", rows)
        again = writer.read(tmp_path / f"{name}{writer.suffix}")
        assert content_of(again) == content_of(rows)
        for suffix in writer.suffixes:
            same = Path(f"export/data/{kind}/{name}{suffix}").read_bytes() == (
                (tmp_path / f"{name}{suffix}").read_bytes()
            )
            assert same or not has_versions


def content_of(rows: Rows) -> list[object]:
    """All that the rows of a shard hold, comparable."""
    arrays = {"row": rows.rows, "valid": rows.valid, "label": rows.labels, **rows.latents}
    lists = [rows.shard, list(rows.keys), list(rows.metadata), list(rows.texts)]
    columns = [(name, c.kind, list(c.values)) for name, c in rows.columns.items()]
    return [lists, columns, [(name, a.dtype.str, a.tolist()) for name, a in arrays.items()]]


@pytest.mark.parametrize("level", LEVELS[:-1])
def test_the_export_is_found_sound(level):
    report = verify_export("export", source="data", level=level)
    assert (report.problems, report.notes) == ([], [])
    assert (report.rows, report.failed_rows) == (NUM_SAMPLES, 1)


def test_the_run_encodes_what_the_export_holds():
    """`verify` allows for another processor and other versions, within a tolerance of its own."""
    report = verify_with_run("export", "run", source="data", shards=None, num_tasks=len(SHARDS))
    assert report.problems == []
    [note] = report.notes
    assert note.startswith(f"{NUM_SAMPLES} rows encoded anew, ")


def test_the_same_export_again_holds_the_same_within_rounding():
    say("export", "run", "export.yaml", "out=again")
    for kind in FORMATS:
        former, anew = LatentDataset("export", format=kind)[:], LatentDataset("again", format=kind)
        assert (anew[:].keys, anew[:].metadata) == (former.keys, former.metadata)
        np.testing.assert_array_equal(anew[:].labels, former.labels)
        assert np.flatnonzero(~anew[:].valid).tolist() == [BAD]
        assert anew.fields == ("mu", "logvar", "mu_hflip", "logvar_hflip")
        for field, values in former.latents.items():
            atol = RTOL * values.std()
            np.testing.assert_allclose(anew[:].latents[field], values, rtol=RTOL, atol=atol)


def test_an_export_whose_tasks_are_committed_is_finished_from_its_files():
    """Neither the model nor the data is needed: keys, statistics and manifest come out again."""
    manifest = read_json("export/manifest.json")
    stats = Path("export/latent_stats.json").read_bytes()
    keys = pq.read_table("export/keys.parquet")
    for name in ("_SUCCESS", "manifest.json", "latent_stats.json", "keys.parquet"):
        Path("export", name).unlink()
    status = export_status("export")
    assert (status.finished, status.committed_rows, status.failed_rows) == (False, NUM_SAMPLES, 1)
    finalize_export("export")
    assert Path("export/latent_stats.json").read_bytes() == stats
    assert pq.read_table("export/keys.parquet").equals(keys)
    # Another pyarrow may write the same keys by other bytes.
    manifest["keys"]["sha256"] = sha256_file(Path("export/keys.parquet"))
    assert read_json("export/manifest.json") == manifest
    digest = hashlib.sha256(Path("export/manifest.json").read_bytes()).hexdigest()
    assert Path("export/_SUCCESS").read_text() == f"{digest}\n"
    assert verify_export("export", source="data").problems == []


# The model.


def test_the_exported_model_is_loaded_and_encodes_as_it_did():
    expected = EXPECTED["model"]
    found = model_of("model")
    assert found["tensors"] == expected["tensors"]
    for name in ("mu", "logvar"):
        np.testing.assert_allclose(found[name], expected[name], rtol=RTOL, atol=RTOL)


def test_the_model_exported_again_is_the_same():
    say("export-model", "run", "again", "--latents", "export")
    again = read_json("again/config.json")
    assert len(again.pop("encoder_sha256")) == 64  # which that code did not write
    assert again == read_json("model/config.json")
    assert model_of("again")["tensors"] == EXPECTED["model"]["tensors"]
