"""Labels, captions and JSON as people have them: counted by reason, and no byte of them lost.

Every text is exported in every format; each format is read by its own reader and by ours.
"""

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from pipeline.common.errors import DONE
from pipeline.common.texts import to_bytes, unescaped
from pipeline.data.index import Index
from pipeline.data.index.left_out import REASONS as INDEX_REASONS
from pipeline.evaluation.exported import probe_export
from pipeline.export.passthrough import REASONS
from pipeline.export.status import export_status
from pipeline.export.verify.levels import verify_export
from pipeline.latents import NO_LABEL, LatentDataset
from pipeline.latents.formats import READERS
from tests.export.foreign import members_of, picture, write_shards
from tests.export.world import make_config, run_export

LATIN_1 = "caf\xe9".encode("latin-1")
LABELS = {  # bytes of the .cls -> label, reason
    b"cat": (NO_LABEL, "label_not_integer"),
    b"3.0": (NO_LABEL, "label_not_integer"),
    b"7": (7, None),
    b" 8\n": (8, None),
    b"-5": (-5, None),
    b"-1": (NO_LABEL, "label_minus_one"),
    b" -1\n": (NO_LABEL, "label_minus_one"),
    b"9223372036854775807": (2**63 - 1, None),
    b"9223372036854775808": (NO_LABEL, "label_not_integer"),
    b"": (NO_LABEL, "label_not_integer"),
    b"0" * 40 + b"5": (NO_LABEL, "label_not_integer"),
    LATIN_1 + b" \\xe9": (NO_LABEL, "label_not_integer"),
    b"\0": (NO_LABEL, "label_not_integer"),
}
TEXTS = {  # bytes of the .txt -> is UTF-8
    LATIN_1: False,
    b"\\xe9 " + LATIN_1 + b"\\": False,
    "späte Blüte".encode("utf-16"): False,
    b"a\0b": True,
    rb"caf\xe9": True,
    "\ufffd\ufeff".encode(): True,
}
JSONS = {  # bytes of the .json -> is JSON
    b'{"a": ': False,
    b'{"name": "' + LATIN_1 + b'"}': False,
    '{"a": 1}'.encode("utf-16"): False,
    b"[" * 100_000 + b"]" * 100_000: False,  # deeper than Python parses
    b"\xef\xbb\xbf" + b'{"score": 2.5}': True,  # a byte order mark, as Windows writes it
    b'{"score": NaN}': True,
    b'{"score": 1, "score": 2}': True,
    b'{"score": 0.5, "text": "' + b"x" * 300_000 + b'"}': True,
    b'{"name": "\\ud800"}': True,
    b"[1, 2]": True,
    b"3": True,
}


def samples() -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield key and members; the last one has a picture alone."""
    for kind, contents in (("cls", LABELS), ("txt", TEXTS), ("json", JSONS)):
        for i, content in enumerate(contents):
            yield f"{kind}{i:02d}", {kind: content}
    yield "none", {}


SAMPLES = dict(samples())
COUNTS = {
    "label_not_integer": 7,
    "label_minus_one": 2,
    "text_not_utf8": 3,
    "json_invalid": 4,
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shard of all of them between two clean ones, of which one has no label and no text."""
    odd = {
        f"{key}.{suffix}": content
        for i, (key, members) in enumerate(SAMPLES.items())
        for suffix, content in (("png", picture(i)), *members.items())
    }
    clean = {
        f"c{i}.{suffix}": content
        for i in range(4)
        for suffix, content in (("png", picture(i)), ("cls", b"%d" % i), ("txt", b"fine"))
    }
    bare = {f"d{i}.png": picture(i) for i in range(4)}
    folder = tmp_path_factory.mktemp("labels") / "data"
    return write_shards(folder, {"0.tar": clean, "1.tar": odd, "2.tar": bare})


@pytest.fixture(scope="module")
def out(run_dir: Path, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("labels") / "out"
    formats = [{"kind": kind} for kind in READERS]
    config = make_config(run_dir, out, formats=formats, data={"path": str(source)})
    assert run_export(config) == DONE
    return out


def expected(kind: str) -> dict[str, bytes | None]:
    """The bytes of each sample's member, by key."""
    return {key: members.get(kind) for key, members in SAMPLES.items()}


def test_all_are_counted_by_reason_and_shown(
    run_dir: Path, source: Path, out: Path, capsys: pytest.CaptureFixture
):
    record = json.loads((out / "_run/commits/1.json").read_bytes())
    assert {reason: found["count"] for reason, found in record["left_out"].items()} == COUNTS
    assert record["left_out"]["label_not_integer"]["example"] == "cls00"
    manifest = json.loads((out / "manifest.json").read_bytes())
    found = {task["name"]: task.get("left_out") for task in manifest["tasks"]}
    assert found == {"0": None, "1": record["left_out"], "2": None}
    lines = [
        f"{count} {REASONS[reason]}, such as {record['left_out'][reason]['example']}"
        for reason, count in COUNTS.items()
    ]
    assert export_status(str(out)).left_out == lines
    report = verify_export(out, source=source)
    assert report.problems == []
    assert report.notes == lines
    formats = [{"kind": kind} for kind in READERS]
    assert run_export(make_config(run_dir, out, formats=formats, data={"path": str(source)})) == 0
    assert capsys.readouterr().err.splitlines()[-4:] == [f"export: {line}" for line in lines]


def test_the_index_counts_the_same_labels_and_texts(source: Path):
    """Of JSON it reads short ones only, and those in other encodings, too."""
    found = {reason: it["count"] for reason, it in Index.open(source).left_out.items()}
    for reason in ("label_not_integer", "label_minus_one", "text_not_utf8"):
        assert found[reason] == COUNTS[reason]
    assert REASONS.keys() <= INDEX_REASONS.keys()


def test_a_tar_holds_the_members_bytes(out: Path):
    found = members_of(out / "data/tar/1.tar")
    for suffix in ("cls", "txt", "json"):
        missing = {"cls": b"-1", "txt": b"", "json": b"null"}[suffix]
        for key, content in expected(suffix).items():
            is_clean = suffix == "cls" and LABELS.get(content or b"", (0, 0))[1] is None
            wanted = missing if content is None else content
            if content is not None and is_clean:
                wanted = str(int(content)).encode()
            assert found[f"{key}.{suffix}"] == wanted, key
            row = json.loads(found[f"{key}.row.json"])
            is_minus_one = content is not None and LABELS.get(content, (0, 0))[1] == (
                "label_minus_one"
            )
            if suffix == "cls":
                assert ("label" in row) == is_minus_one


@pytest.mark.parametrize("folder", ["parquet", "npy"])
def test_parquet_says_what_is_escaped(out: Path, folder: str):
    table = pq.read_table(out / f"data/{folder}/1.parquet")
    described = json.loads(table.schema.metadata[b"latentmill"])
    keys = table["key"].to_pylist()
    for column, suffix in (("text", "txt"), ("metadata", "json")):
        for i, (key, text) in enumerate(zip(keys, table[column].to_pylist(), strict=True)):
            is_escaped = i in described["escaped"][column]
            data = None if text is None else to_bytes(unescaped(text) if is_escaped else text)
            assert data == expected(suffix)[key], key
    assert sorted(described["label_text"]) == sorted(
        str(keys.index(key))
        for key, content in expected("cls").items()
        if content is not None and LABELS[content][1]
    )
    for i, text in described["label_text"].items():
        assert to_bytes(unescaped(text)) == expected("cls")[keys[int(i)]]
        assert table["label"][int(i)].as_py() is None


def test_clean_shards_have_the_schema_of_all_others(out: Path):
    """Columns do not depend on what a shard holds, and nothing is said where nothing is odd."""
    files = sorted((out / "data/parquet").iterdir())
    schemas = [pq.read_schema(path) for path in files]
    assert schemas[0].equals(schemas[1])
    assert schemas[0].equals(schemas[2], check_metadata=True)
    assert set(json.loads(schemas[0].metadata[b"latentmill"])) == {
        *("version", "latent_shape", "dtype", "fields", "columns")
    }
    assert len(pads.dataset(files).to_table()) == 8 + len(SAMPLES)


def test_safetensors_hold_the_bytes(out: Path):
    tensors = load_file(out / "data/safetensors/1.safetensors")
    keys = unpacked(tensors, "key")
    for name, suffix in (("text", "txt"), ("metadata", "json")):
        contents = dict(zip(keys, unpacked(tensors, name), strict=True))
        assert {key.decode(): data or None for key, data in contents.items()} == expected(suffix)
    for row, text in zip(
        tensors["label_text_rows"].tolist(), unpacked(tensors, "label_text"), strict=True
    ):
        assert expected("cls")[keys[row].decode()] == text
    assert "label_text_rows" not in load_file(out / "data/safetensors/0.safetensors")


def unpacked(tensors: dict[str, np.ndarray], name: str) -> list[bytes]:
    data, offsets = tensors[f"{name}_bytes"].tobytes(), tensors[f"{name}_offsets"].tolist()
    return [data[lo:hi] for lo, hi in pairwise(offsets)]


def test_the_reader_tells_the_two_meanings_of_minus_one_apart(out: Path):
    columns = {}
    for kind in READERS:
        ds = LatentDataset(out, format=kind)
        columns[kind] = [ds.column(n).tolist() for n in ("label", "label_text", "text", "metadata")]
    for found in columns.values():
        assert found == columns["tar"]
    labels, texts, captions, _ = columns["tar"]
    keys = LatentDataset(out).column("key").tolist()
    for key, content in expected("cls").items():
        row = keys.index(key)
        label, reason = (NO_LABEL, None) if content is None else LABELS[content]
        assert labels[row] == label
        assert (texts[row] is None) == (reason is None), key
    assert texts[keys.index("cls05")] == "-1"
    assert texts[keys.index("none")] is texts[keys.index("d0")] is None
    assert captions[keys.index("txt00")] == r"caf\xe9"
    assert labels[:4] == [0, 1, 2, 3]


def test_fields_are_read_where_there_is_json(out: Path):
    with pytest.raises(Exception, match="no target at all"):
        probe_export(out)


def test_a_label_field_of_minus_one_is_counted_too(run_dir: Path, tmp_path: Path):
    """It is not the `.cls` then, so that counts for nothing."""
    members = {}
    for i, value in enumerate((-1, 3, 5)):
        members |= {
            f"{i}.png": picture(i),
            f"{i}.cls": b"cat",
            f"{i}.json": b'{"class": %d}' % value,
        }
    data = write_shards(tmp_path / "data", {"0.tar": members})
    settings = {"data": {"path": str(data), "label_field": "class"}}
    settings["formats"] = [{"kind": kind} for kind in READERS]
    assert run_export(make_config(run_dir, tmp_path / "out", **settings)) == DONE
    assert export_status(str(tmp_path / "out")).left_out == [
        f"1 {REASONS['label_minus_one']}, such as 0"
    ]
    for kind in READERS:
        ds = LatentDataset(tmp_path / "out", format=kind)
        assert ds.column("label").tolist() == [-1, 3, 5]
        assert ds.column("label_text").tolist() == ["-1", None, None]
    assert verify_export(tmp_path / "out", source=data).problems == []
