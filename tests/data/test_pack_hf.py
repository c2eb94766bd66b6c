"""`pack hf`: data sets that `datasets` itself wrote, from everywhere it puts them."""

import io
import json
import math
import shutil
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.__main__ import main
from pipeline.common.errors import UserError
from pipeline.data.index import Index
from pipeline.data.pack.pack import PackReport, pack
from pipeline.data.pack.sources import HuggingFace

hub = pytest.importorskip("datasets", reason="needs datasets, of the extra train")

CLASSES = ["cat", "dog", "eel"]
SPLITS = {"train": range(20), "test": range(20, 26)}


def picture(number: int) -> bytes:
    """A picture of its own for every number: JPEG, PNG and WebP in turn."""
    pixels = np.random.default_rng(number).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, ("JPEG", "PNG", "WEBP")[number % 3])
    return buffer.getvalue()


def rows(numbers: Sequence[int]) -> dict[str, list[Any]]:
    """Columns of a data set; label, caption and score are missing in some rows."""
    return {
        "image": [{"bytes": picture(n), "path": f"{n}.any"} for n in numbers],
        "label": [n % 3 if n % 5 else -1 for n in numbers],
        "caption": [f"Nr. {n}, ä" if n % 4 else None for n in numbers],
        "score": [math.nan if n % 6 == 1 else n / 2 if n % 6 else None for n in numbers],
        "boxes": [[{"x": n, "tags": ["a"]}] * (n % 3) for n in numbers],
        "taken": [date(2026, 1, 1 + n) for n in numbers],
        "raw": [b"\xff"] * len(numbers),
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same data set as Parquet, by `save_to_disk`, and in both caches below `hf`."""
    root = tmp_path_factory.mktemp("hub")
    box = {"x": hub.Value("int64"), "tags": hub.List(hub.Value("string"))}
    features = hub.Features(
        {
            "image": hub.Image(),
            "label": hub.ClassLabel(names=CLASSES),
            "caption": hub.Value("string"),
            "score": hub.Value("float32"),
            "boxes": hub.List(box),
            "taken": hub.Value("date32"),
            "raw": hub.Value("binary"),
        }
    )
    splits = hub.DatasetDict(
        {name: hub.Dataset.from_dict(rows(n), features) for name, n in SPLITS.items()}
    )
    data = root / "pets/data"
    data.mkdir(parents=True)
    for number in range(2):
        part = splits["train"].shard(2, number, contiguous=True)
        part.to_parquet(data / f"train-0000{number}-of-00002.parquet", batch_size=4)
    splits["test"].to_parquet(data / "test-00000-of-00001-0a1b2c.parquet")
    (root / "pets/README.md").write_text("# Pets\n")
    splits.save_to_disk(root / "saved", num_shards={"train": 3, "test": 1})
    cache = root / "hf/hub/datasets--me--pets"
    shutil.copytree(root / "pets", cache / "blobs")
    for blob in (cache / "blobs/data").iterdir():
        link = cache / "snapshots/abc/data" / blob.name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    (cache / "snapshots/old").mkdir()
    (cache / "refs").mkdir()
    (cache / "refs/main").write_text("abc")
    hub.load_dataset(str(root / "pets"), cache_dir=str(root / "hf/datasets"))
    return root


@pytest.fixture(autouse=True)
def caches(monkeypatch: pytest.MonkeyPatch, made: Path) -> None:
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_DATASETS_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(made / "hf"))


def samples(out: Path) -> dict[str, dict[str, bytes]]:
    """Key -> members of everything that was packed."""
    index, found = Index.open(out), dict[str, dict[str, bytes]]()
    for number, shard in enumerate(index.shards):
        data = (out / shard.name).read_bytes()
        for sample in index.table(number).samples():
            members = sample.members.items()
            found[sample.key] = {name: data[at : at + size] for name, (at, size) in members}
    return found


def expected(number: int) -> dict[str, bytes]:
    """The members of a row, with `caption` as text."""
    columns = rows([number])
    members = {("jpg", "png", "webp")[number % 3]: picture(number)}
    if number % 5:
        members["cls"] = b"%d" % (number % 3)
    if number % 4:
        members["txt"] = f"Nr. {number}, ä".encode()
    others = {
        "score": "NaN" if number % 6 == 1 else columns["score"][0],
        "boxes": columns["boxes"][0],
        "taken": str(columns["taken"][0]),
        "path": f"{number}.any",
    }
    return {**members, "json": json.dumps(others, separators=(",", ":")).encode()}


@pytest.mark.parametrize(
    "source", ["pets", "pets/data", "saved", "me/pets", "hf/hub/datasets--me--pets", "hf/datasets"]
)
def test_the_same_data_set_from_everywhere(made: Path, tmp_path: Path, source: str):
    named = source if source == "me/pets" else str(made / source)
    report = pack(HuggingFace(source=named, text="caption", shard_samples=7), tmp_path / "out")
    whole = {
        f"{split}/{number - numbers[0]:09d}": expected(number)
        for split, numbers in SPLITS.items()
        for number in numbers
    }
    assert samples(tmp_path / "out") == whole
    assert list(samples(tmp_path / "out")) == sorted(whole)  # by splits, and as their rows are
    assert (report.num_samples, report.num_shards, report.num_broken) == (26, 4, 0)
    assert report.classes == tuple(CLASSES)
    assert report.num_without_label == sum(number % 5 == 0 for number in range(26))
    assert report.ignored == {"column raw": 26}


def test_one_split_has_plain_keys_and_any_number_of_workers_gives_the_same(
    made: Path, tmp_path: Path
):
    argv = ["pack", "hf", str(made / "saved"), str(tmp_path / "cli"), "--source-split", "test"]
    assert main([*argv, "--text", "caption", "--workers", "1", "--shard-samples", "2"]) == 0
    assert samples(tmp_path / "cli") == {f"{n - 20:09d}": expected(n) for n in SPLITS["test"]}
    with pytest.raises(UserError, match="no split dev: test, train"):
        pack(HuggingFace(source=str(made / "saved"), source_split="dev"), tmp_path / "dev")


def test_one_saved_data_set(made: Path, tmp_path: Path):
    """Its folder is the split's, whatever that is called."""
    shutil.copytree(made / "saved/test", tmp_path / "moved")
    (tmp_path / "moved/cache-0123.arrow").write_bytes(b"of Dataset.map")
    pack(HuggingFace(source=str(tmp_path / "moved"), text="caption"), tmp_path / "out")
    assert samples(tmp_path / "out") == {f"{n - 20:09d}": expected(n) for n in SPLITS["test"]}


def test_the_identity_is_of_the_data_not_of_its_place(made: Path, tmp_path: Path):
    shutil.copytree(made / "pets", tmp_path / "elsewhere")
    first = pack(HuggingFace(source=str(made / "pets")), tmp_path / "out")
    assert pack(HuggingFace(source=str(tmp_path / "elsewhere")), tmp_path / "out") == first
    with pytest.raises(UserError, match="another source"):
        pack(HuggingFace(source=str(made / "pets"), text="caption"), tmp_path / "out")
    with pytest.raises(UserError, match="another source"):
        pack(HuggingFace(source=str(made / "pets"), source_split="test"), tmp_path / "out")


def test_an_image_folder_of_datasets_names_its_files(tmp_path: Path):
    """`load_dataset("imagefolder")` keeps paths alone; sizes are those of the files."""
    for number, name in enumerate(CLASSES):
        path = tmp_path / f"photos/{name}/{number}.png"
        path.parent.mkdir(parents=True)
        path.write_bytes(picture(3 * number + 1))
    cache = str(tmp_path / "cache")
    hub.load_dataset("imagefolder", data_dir=str(tmp_path / "photos"), cache_dir=cache)
    (tmp_path / "photos/eel/2.png").unlink()
    report = pack(HuggingFace(source=cache, shard_bytes=1), tmp_path / "out")
    assert (report.num_shards, report.num_samples) == (2, 2)  # the sizes of files are known
    found = samples(tmp_path / "out")
    assert [sample["png"] for sample in found.values()] == [picture(1), picture(4)]
    assert [json.loads(sample["json"]) for sample in found.values()] == [
        {"path": "0.png"},
        {"path": "1.png"},
    ]
    assert report.broken == (("000000002", "2.png cannot be read: No such file or directory"),)


def packed(tmp_path: Path, columns: dict[str, Any], **settings: Any) -> PackReport:
    """Pack a data set of these columns, in Parquet without a word of `datasets`."""
    (tmp_path / "plain").mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), tmp_path / "plain/any.parquet", row_group_size=2)
    return pack(HuggingFace(source=str(tmp_path / "plain"), **settings), tmp_path / "out")


def test_columns_of_bytes_and_of_paths(tmp_path: Path):
    files = {"photos/a.b.jpg": picture(0), "1.png": picture(1), "none.gif": b"GIF89a"}
    for name, content in files.items():
        (tmp_path / "plain" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "plain" / name).write_bytes(content)
    columns = {
        "file_name": [*files, "gone.png", None, "https://host/1.png"],
        "data": [*map(picture, range(3, 6)), None, b"", picture(8)],
    }
    report = packed(tmp_path, columns, image="file_name", key="file_name")
    assert [(key, len(members)) for key, members in samples(tmp_path / "out").items()] == [
        ("photos/a%2Eb%2Ejpg", 2),
        ("1%2Epng", 2),
    ]
    assert report.broken == (
        ("none%2Egif", "the picture is no JPEG, PNG or WebP"),
        ("gone%2Epng", "gone.png cannot be read: No such file or directory"),
        ("000000004", "the row's key is None"),
        ("https://host/1%2Epng", "1.png cannot be read: No such file or directory"),
    )
    shutil.rmtree(tmp_path / "out")
    report = packed(tmp_path, columns, image="data")
    assert [next(iter(m)) for m in samples(tmp_path / "out").values()] == ["jpg", *["json"] * 3]
    assert [reason for _, reason in report.broken] == ["the row holds no picture"] * 2


def test_texts_and_numbers_as_labels(tmp_path: Path):
    pictures = [{"bytes": picture(n), "path": None} for n in range(4)]
    names, numbers = ["dog", None, "ant", "dog"], [7, None, -2, -1]
    columns = {"picture": pictures, "name": names, "number": numbers}
    report = packed(tmp_path, columns, label="name")
    labels = [sample.get("cls") for sample in samples(tmp_path / "out").values()]
    assert (labels, report.classes) == ([b"1", None, b"0", b"1"], ("ant", "dog"))
    shutil.rmtree(tmp_path / "out")
    report = packed(tmp_path, columns, label="number")
    found = samples(tmp_path / "out").values()
    assert [sample.get("cls") for sample in found] == [b"7", None, b"-2", None]
    assert [json.loads(sample["json"]) for sample in found] == [{"name": name} for name in names]
    assert (report.classes, report.num_without_label) == ((), 2)


PICTURES = [{"bytes": picture(0), "path": None}] * 2
WRONG: dict[str, tuple[dict[str, Any], dict[str, str], str]] = {
    "none": ({"a": [1]}, {}, r"has 0 columns of pictures .* --image\. Its columns: a \(int64\)\."),
    "two": ({"a": PICTURES, "b": PICTURES}, {}, "has 2 columns of pictures"),
    "unknown": ({"image": PICTURES}, {"image": "imag"}, "no such column; did you mean 'image'?"),
    "type": ({"image": PICTURES, "n": [1.5, 2]}, {"label": "n"}, "--label n: .* of another type"),
    "text": ({"image": PICTURES, "n": [1, 2]}, {"text": "n"}, "--text n: .* of another type"),
    "keys": ({"image": PICTURES, "k": ["a", "a"]}, {"key": "k"}, "in a row have the key a"),
    "rows": ({"image": PICTURES[:0], "k": pa.array([], "int8")}, {"image": "k"}, "another type"),
}


@pytest.mark.parametrize("case", WRONG)
def test_unclear_columns_are_refused_with_all_their_names(tmp_path: Path, case: str):
    columns, settings, message = WRONG[case]
    with pytest.raises(UserError, match=message):
        packed(tmp_path, columns, **settings)
    assert not list(tmp_path.glob("out/*.tar"))


def break_numbers(pets: Path) -> str:
    (pets / "data/train-00001-of-00002.parquet").unlink()
    return "holds 1 of the 2 files of train; number 00001 is missing: fetch"


def break_link(pets: Path) -> str:
    (pets / "data/train-00001-of-00002.parquet").unlink()
    (pets / "data/train-00001-of-00002.parquet").symlink_to("../blobs/1")
    return r"train-00001-of-00002\.parquet is missing: fetch"


def break_bytes(pets: Path) -> str:
    path = pets / "data/train-00001-of-00002.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    return r"train-00001-of-00002\.parquet cannot be read: "


def add_configuration(pets: Path) -> str:
    shutil.copytree(pets / "data", pets / "small")
    return "holds several configurations with a split t.*: data, small. Name the folder of one"


def take_column(pets: Path) -> str:
    path = pets / "data/train-00001-of-00002.parquet"
    pq.write_table(pq.read_table(path).drop_columns("score"), path)
    return "train-00001-of-00002.parquet lacks the column score, which .*test-00000"


def leave_only_words(pets: Path) -> str:
    shutil.rmtree(pets / "data")
    return r"no Parquet and no Arrow files.*load_dataset\(.*\)\.save_to_disk"


@pytest.mark.parametrize(
    "change",
    [break_numbers, break_link, break_bytes, add_configuration, take_column, leave_only_words],
)
def test_data_sets_that_are_not_whole_are_refused(
    made: Path, tmp_path: Path, change: Callable[[Path], str]
):
    shutil.copytree(made / "pets", tmp_path / "pets")
    message = change(tmp_path / "pets")
    with pytest.raises(UserError, match=message):
        pack(HuggingFace(source=str(tmp_path / "pets")), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_is_downloaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["pack", "hf", "you/pets", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "`hf download you/pets --repo-type dataset` fetches it; pack downloads nothing" in said


@pytest.mark.parametrize("kind", ["parquet", "arrow", "file.arrow"])
def test_memory_is_bounded(tmp_path: Path, kind: str):
    """64 pictures of 1 MB in one row group or record batch: few, or a page, are held."""
    content = np.random.default_rng(0).bytes(1 << 20)
    table = pa.table({"image": [b"\xff\xd8\xff" + content] * 64, "n": list(range(64))})
    path = tmp_path / f"big.{kind}"
    if kind == "parquet":
        pq.write_table(table, path, use_dictionary=False, write_batch_size=4)  # small pages
    else:
        new = pa.ipc.new_stream if kind == "arrow" else pa.ipc.new_file
        with pa.OSFile(str(path), "wb") as file, new(file, table.schema) as writer:
            writer.write_table(table)
    del table
    samples = HuggingFace(source=str(path), image="image").open()
    assert sum(samples.sizes()) > 60 << 20
    before, most = pa.total_allocated_bytes(), 0
    for number, sample in enumerate(samples.part(10, 64).read(), start=10):
        assert json.loads(sample.members["json"]) == {"n": number}
        most = max(most, pa.total_allocated_bytes() - before)
    assert number == 63
    assert most < 40 << 20


def test_a_state_that_datasets_did_not_write(made: Path, tmp_path: Path):
    """Another program's state.json is passed over; half of one is said."""
    shutil.copytree(made / "pets", tmp_path / "set")
    (tmp_path / "set" / "state.json").write_text("[1]")
    assert len(HuggingFace(source=str(tmp_path / "set")).open()) == 26
    (tmp_path / "set" / "state.json").write_text('{"_data_files": [')
    with pytest.raises(UserError, match=r"state\.json cannot be read"):
        HuggingFace(source=str(tmp_path / "set")).open()
