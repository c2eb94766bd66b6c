"""Names of files: every readable picture becomes one sample, for all readers of webdataset tars."""

import base64
import hashlib
import json
import os
import tarfile
import warnings
from pathlib import Path
from urllib.parse import unquote_to_bytes

import numpy as np
import pytest
import webdataset as wds

from pipeline.common.tars import open_tar
from pipeline.data.index import Index
from pipeline.data.pack.keys import key_of, keys_of, readable
from pipeline.data.pack.pack import pack
from pipeline.data.pack.sources import Folder
from pipeline.latents.files import LocalFiles
from pipeline.latents.formats.reading import Layout
from pipeline.latents.formats.tar.reader import TarShard
from pipeline.latents.formats.tar.writer import TarWriter
from pipeline.latents.formats.writing import Rows

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNoAAAAggCBd81ytgAAAABJRU5ErkJggg=="
)  # one grey pixel
# What has lost pictures, or their packs, and what looks like it.
NAMES: dict[str, list[str | bytes]] = {
    "background": [f"{folder}/{n}" for folder in ("__background__", "cats") for n in range(10)],
    "underscores": ["__/1", "____/1", "__a__b__/1", "a/__b__/1", "__c__x/1", "a/__1__", "a/__1"],
    "long": ["a/" + "あ" * 80, "a/" + "x" * 251, "/".join(["d" * 200] * 5) + "/1", "b/" + "é" * 49],
    "twins": ["b/1.jpg", "b/1.png", "b/1.PNG", "b/1.jpg.png", "b/1%2Ejpg", "c/1.png", "c/1.webp"],
    "not UTF-8": [b"caf\xe9/1", "caf%E9/1", b"caf\xe9/%41", b"a/\xff", b"a/\xfe"],
    "dots": ["v1.0/IMG_2024.00001", "v1.0/IMG_2024.00002", "v1.0/1..2", "v1.0/a.", "v1%2E0/a"],
    "signs": ["a\nb.c/1", "a/b\n", "100%/1", "a%41/1", "aA/1", "a/ ", "b\\c/1", "a/'\"*?", "a:b/1"],
    "alike": ["a/é", "a/e\u0301", "A/a", "a/a", "a/A"],
}  # fmt: skip


def make(root: Path, names: list[str | bytes]) -> dict[bytes, bytes]:
    """A file for each name, `.png` unless it has a suffix; every one with a content of its own."""
    files: dict[bytes, bytes] = {}
    for number, name in enumerate(names):
        path = os.fsencode(name)
        path += b"" if path.lower().endswith((b".png", b".jpg", b".webp")) else b".png"
        files[path] = PNG + b"%d" % number
        place = root / os.fsdecode(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(files[path])
    return files


def by_webdataset(shard: Path) -> list[tuple[str, list[bytes]]]:
    """Keys and pictures, as webdataset finds them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # webdataset leaves its files to the collector
        found = list(wds.WebDataset([str(shard)], shardshuffle=False))
    suffixes = ("png", "jpg", "webp")
    return [(s["__key__"], [s[name] for name in suffixes if name in s]) for s in found]


def by_tarfile(shard: Path) -> list[tuple[str, list[bytes]]]:
    """The same by Python's tarfile, whose members are told apart by their last suffix."""
    found: dict[str, list[bytes]] = {}
    with tarfile.open(shard) as tar:
        for member in tar:
            key, _, suffix = member.name.rpartition(".")
            content = tar.extractfile(member)
            assert content is not None
            found.setdefault(key, []).extend([] if suffix in ("cls", "json") else [content.read()])
    return list(found.items())


def by_our_reader(out: Path) -> list[tuple[str, list[bytes]]]:
    data = (out / "shard-000000.tar").read_bytes()
    found: list[tuple[str, list[bytes]]] = []
    for sample in Index.open(out).table(0).samples():
        pictures = [r for suffix, r in sample.members.items() if suffix not in ("cls", "json")]
        found.append((sample.key, [data[at : at + size] for at, size in pictures]))
    return found


@pytest.mark.parametrize("kind", NAMES)
def test_every_file_is_one_sample_for_every_reader(tmp_path: Path, kind: str):
    files = make(tmp_path / "photos", NAMES[kind])
    report = pack(Folder(source=tmp_path / "photos"), tmp_path / "out")
    assert (report.num_samples, report.lost, report.num_broken) == (len(files), (), 0)
    shard = tmp_path / "out/shard-000000.tar"
    readers = [by_webdataset(shard), by_tarfile(shard), by_our_reader(tmp_path / "out")]
    for found in readers:
        contents = sorted(content for _, pictures in found for content in pictures)
        assert contents == sorted(files.values())
        assert all(len(pictures) == 1 for _, pictures in found)
        # The escapes can be taken back: a key is the name of its file, but for the suffix.
        for key, (content,) in found:
            (path,) = (path for path, of_file in files.items() if of_file == content)
            assert unquote_to_bytes(key) in (path, path.rpartition(b".")[0])
    assert [key for key, _ in readers[0]] == [key for key, _ in readers[2]]


@pytest.mark.parametrize("kind", NAMES)
def test_paths_and_classes_are_text_for_every_reader_of_json(tmp_path: Path, kind: str):
    files = make(tmp_path / "photos", NAMES[kind])
    report = pack(Folder(source=tmp_path / "photos"), tmp_path / "out")
    paths: list[str] = []
    with tarfile.open(tmp_path / "out/shard-000000.tar") as tar:
        for member in tar:
            if member.name.endswith(".json"):
                origin = json.load(tar.extractfile(member))
                paths.append(origin["path"].encode().decode())  # no half of a character
                assert origin["class"] in report.classes
    assert sorted(paths) == sorted(readable(os.fsdecode(path)) for path in files)
    assert "\n".join(report.lines()).encode()


def test_clean_names_are_packed_as_ever(tmp_path: Path):
    """The digests are of what commit 93dd2d6 wrote."""
    names = ["cats/a.b", "cats/sub/c.PNG", "dogs/100%", f"dogs/{'é' * 60}/{'x' * 90}"]
    for name in [*names, "_dogs/__1__", "d.2/e f"]:
        path = tmp_path / "clean" / (name if name.endswith("PNG") else f"{name}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(PNG)
    pack(Folder(source=tmp_path / "clean", shuffle_seed=3), tmp_path / "out")
    digest = hashlib.sha256((tmp_path / "out/shard-000000.tar").read_bytes()).hexdigest()
    assert digest == "3ffcd8fe22f4fb7cb5a5a0a8305c7ac387fbfb71b228d12b27513eb17e0aa164"
    summary = json.loads((tmp_path / "out/pack.json").read_bytes())
    assert summary["identity"] == {
        "shard_bytes": 256 << 20,
        "shard_samples": 10_000,
        "source": {
            "kind": "folder",
            "version": 1,
            "files": 6,
            "listing_sha256": "ff4c7576cebe3d00d452efee9d629db387318c327767326499fff544e1716358",
            "resize": None,
            "shuffle_seed": 3,
            "pillow": None,
        },
    }


def test_keys_are_never_alike():
    """By chance: short names of the characters that mean something."""
    draw = np.random.default_rng(1)
    signs = np.array([*"a._%/2E5F1\n", "\udce9"])
    names = {"".join(draw.choice(signs, draw.integers(1, 9))) for _ in range(3_000)}
    keys = {key_of(name) for name in names}
    assert len(keys) == len(names)
    assert all(os.fsdecode(unquote_to_bytes(key_of(name))) == name for name in names)
    paths = [f"{name}.{suffix}" for name in sorted(names) for suffix in ("jpg", "png")]
    assert len(set(keys_of(paths).values())) == len(paths)


def test_long_names_in_exports(tmp_path: Path):
    """Exports' tars are written by the same function, and read by headers."""
    keys = ["a", "あ" * 90, "/".join(["d" * 90] * 4), "b", "x" * 3000]
    latents = np.arange(10, dtype=np.float32).reshape(5, 2)
    rows = Rows(
        shard="s",
        keys=keys,
        rows=np.arange(5),
        valid=np.ones(5, np.bool_),
        labels=np.arange(5),
        metadata=[None] * 5,
        texts=["text"] * 5,
        latents={"mu": latents},
    )
    TarWriter().write(tmp_path / "s.tar", rows)
    assert TarWriter().read(tmp_path / "s.tar").keys == keys
    layout = Layout(("mu",), (2,), "float32")
    shard = TarShard([LocalFiles(tmp_path).open("s.tar")], layout)
    assert shard.column("key", np.arange(5)).tolist() == keys
    np.testing.assert_array_equal(shard.latents("mu", np.arange(5)), latents)


def test_only_names_that_need_it_get_a_header_more(tmp_path: Path):
    fits, just, long = "a" * 96, "b" * 154 + "/" + "c" * 96, "d" * 97
    with open_tar(tmp_path / "a.tar") as write:
        for key in (fits, just, long):
            write(key, {"jpg": b"1"})
    with tarfile.open(tmp_path / "a.tar") as tar:
        assert [(m.name, bool(m.pax_headers)) for m in tar] == [
            (f"{fits}.jpg", False),
            (f"{just}.jpg", False),
            (f"{long}.jpg", True),
        ]
