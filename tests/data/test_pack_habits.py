"""Folders as people have them, packed: nothing refused without need, nothing lost silently."""

import argparse
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from PIL import Image

from pipeline.__main__ import main
from pipeline.commands import pack as verb
from pipeline.common.errors import UserError
from pipeline.data.decode import ImageDecode, libraries
from pipeline.data.index import Index
from pipeline.data.index.verify import verify_shards
from pipeline.data.pack.pack import pack
from pipeline.data.pack.parts import enough_shards
from pipeline.data.pack.sources import Broken, Folder, PackSource, Sample, Sprites
from pipeline.data.pack.sources.base import MAX_PIXELS, PILLOW_MAX_PIXELS

NOBODY = 65534


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two pictures of cats, one of a dog."""
    for name in ("cats/0.png", "cats/1.png", "dogs/0.png"):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 4)).save(path)
    return tmp_path / "photos"


def keys(out: Path) -> list[str]:
    index = Index.open(out)
    return [key for table in map(index.table, range(len(index.shards))) for key in table.keys()]  # noqa: SIM118


def broken(out: Path) -> dict[str, str]:
    lines = map(json.loads, (out / "broken.jsonl").read_text().splitlines())
    return {line["path"]: line["reason"] for line in lines}


def test_what_an_operating_system_leaves_is_counted_by_kind(photos: Path, tmp_path: Path):
    for name in (
        *(".DS_Store", "cats/.DS_Store", "cats/._0.png", "Thumbs.db", "dogs/desktop.ini"),
        *("__MACOSX/cats/0.png", "__MACOSX/cats/._0.png", "dogs/__MACOSX/0.jpg", "@eaDir/0.png"),
        *("cats/.0.png", ".thumbnails/0.png", ".git/objects/1"),
        *("notes.txt", "README", "cats/0.PNG.part"),
    ):
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        (photos / name).write_bytes((photos / "cats/0.png").read_bytes())
    report = pack(Folder(source=photos), tmp_path / "out")
    assert keys(tmp_path / "out") == ["cats/0", "cats/1", "dogs/0"]
    assert report.ignored == {"sidecar": 9, "hidden": 3, ".txt": 1, "no suffix": 1, ".part": 1}
    assert report.classes == ("cats", "dogs")
    text = "\n".join(report.lines())
    assert "ignored                     .part 1, .txt 1, hidden 3, no suffix 1, sidecar 9" in text


def make_faults(photos: Path) -> dict[str, str]:
    """Put what cannot be packed into the folder; return its reasons."""
    (photos / "cats/gone.jpg").symlink_to("nothing.jpg")
    (photos / "birds").symlink_to("/nowhere/birds")  # perhaps a whole class
    (photos / "self").symlink_to("self")
    (photos / "cats/up").symlink_to("..")  # a circle
    (photos / "dogs/again").symlink_to("../cats")
    os.mkfifo(photos / "cats/pipe.png")  # whoever reads it waits for ever
    with socket.socket(socket.AF_UNIX) as made:
        os.chdir(photos)  # the path of a socket must be short
        made.bind("socket.webp")
    (photos / ".hidden.png").symlink_to("nothing.png")  # hidden: not looked at
    (photos / "notes.txt").symlink_to("nothing.txt")  # no picture, whatever it was
    return {
        "birds": "a link that leads nowhere: No such file or directory",
        "cats/gone.jpg": "a link that leads nowhere: No such file or directory",
        "cats/pipe.png": "no plain file",
        "cats/up": "a link to a folder that is listed already",
        "dogs/again": "a link to a folder that is listed already",
        "self": "a link that leads nowhere: Too many levels of symbolic links",
        "socket.webp": "no plain file",
    }


def test_what_cannot_be_packed_is_listed_whole(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    faults = make_faults(photos)
    with pytest.raises(UserError, match=f"because of {len(faults)}:\n") as refused:
        pack(Folder(source=photos), tmp_path / "out")
    lines = [f"  {path}: {reason}" for path, reason in faults.items()]
    assert str(refused.value).splitlines()[1:-1] == lines
    assert "--leave-out" in str(refused.value)
    assert not (tmp_path / "out").exists()

    report = pack(Folder(source=photos, leave_out=True), tmp_path / "out")
    assert keys(tmp_path / "out") == ["cats/0", "cats/1", "dogs/0"]
    assert (report.num_broken, broken(tmp_path / "out")) == (len(faults), faults)
    assert report.ignored == {".txt": 1, "hidden": 1}
    again = pack(Folder(source=photos, leave_out=True), tmp_path / "again")
    assert again.dataset_id == report.dataset_id


@pytest.fixture
def somebodys_folder() -> Iterator[Path]:
    """A folder of a user who is not root: root may read everything."""
    folder = Path(tempfile.mkdtemp())
    user = os.geteuid()
    os.chown(folder, NOBODY if user == 0 else user, -1)
    os.seteuid(NOBODY if user == 0 else user)
    yield folder
    os.seteuid(user)
    shutil.rmtree(folder, ignore_errors=True)


def test_files_of_others_are_listed(somebodys_folder: Path):
    photos = somebodys_folder / "photos"
    for name in ("cats/0.png", "cats/1.png", "dogs/0.png"):
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        (photos / name).write_bytes(b"content")
    (photos / "cats/1.png").chmod(0)
    (photos / "dogs").chmod(0)
    faults = {
        "cats/1.png": "may not be read by this user",
        "dogs": "a folder that cannot be listed: Permission denied",
    }
    with pytest.raises(UserError, match="because of 2:") as refused:
        Folder(source=photos).open()
    assert all(f"  {path}: {reason}\n" in str(refused.value) for path, reason in faults.items())
    _, *rest = Folder(source=photos, leave_out=True).open().part(0, 3).read()
    (photos / "dogs").chmod(0o755)
    assert rest == [Broken(path, reason) for path, reason in faults.items()]


@pytest.mark.parametrize("leave_out", [False, True])
def test_a_file_that_goes_while_the_folder_is_packed(photos: Path, leave_out: bool):
    samples = Folder(source=photos, leave_out=leave_out).open()
    (photos / "cats/1.png").unlink()
    if not leave_out:
        with pytest.raises(UserError, match=r"cats/1\.png: cannot be read: No such file"):
            list(samples.part(0, 3).read())
        return
    found = list(samples.part(0, 3).read())
    assert [getattr(sample, "key", None) for sample in found] == ["cats/0", None, "dogs/0"]


def test_a_linked_folder_is_packed_under_its_own_name_first(photos: Path, tmp_path: Path):
    """Whichever the file system lists first: linked folders come last."""
    (photos / "a").symlink_to("dogs")
    (tmp_path / "elsewhere").mkdir()
    Image.new("L", (4, 4)).save(tmp_path / "elsewhere/0.png")
    (photos / "birds").symlink_to("../elsewhere")
    with pytest.raises(UserError, match=r"because of 1:\n  a: a link to a folder"):
        Folder(source=photos).open()
    pack(Folder(source=photos, leave_out=True), tmp_path / "out")
    assert keys(tmp_path / "out") == ["birds/0", "cats/0", "cats/1", "dogs/0"]


def test_what_is_left_out_is_told_in_a_line_each(photos: Path, tmp_path: Path):
    """Too large is not unreadable; and a name may hold anything but a slash and a zero."""
    Image.new("RGB", (40, 30)).save(photos / "cats/large.png")
    (photos / "cats/two\nlines\x1b[31m.png").write_bytes(b"x")
    (photos / "cats/gone\n.png").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"because of 1:\n  cats/gone\\n\.png: a link that leads"):
        Folder(source=photos).open()
    folder = Folder(source=photos, leave_out=True, max_pixels=1199)
    lines = pack(folder, tmp_path / "out").lines()
    assert lines[0].endswith("; 3 files left out")
    assert lines[-4] == "left out (3; all in broken.jsonl)"
    assert lines[-3].startswith(r"  cats/gone\n.png: a link that leads nowhere")
    assert lines[-2] == "  cats/large.png: size: 40 x 30 pixels are more than --max-pixels = 1199"
    assert lines[-1].startswith(r"  cats/two\nlines\x1b[31m.png: decode: Unidentified")
    for path in photos.rglob("*.png"):
        path.rename(path.with_suffix(".heic"))
    with pytest.raises(UserError, match=r"No image below .*\. There are: \.heic 6\."):
        Folder(source=photos).open()


def test_pictures_beside_class_folders_have_no_class(photos: Path, tmp_path: Path):
    Image.new("RGB", (4, 4)).save(photos / "stray.png")
    report = pack(Folder(source=photos), tmp_path / "out")
    assert keys(tmp_path / "out") == ["cats/0", "cats/1", "dogs/0", "stray"]
    assert Index.open(tmp_path / "out").table(0).labels.tolist() == [0, 0, 1, -1]
    assert (report.num_without_label, report.classes) == (1, ("cats", "dogs"))
    assert f"{'without a class':<28}1" in report.lines()


def test_large_pictures_go_in_on_demand(photos: Path, tmp_path: Path):
    """The bound is decode's; --max-pixels moves it, here down, since large files take seconds."""
    assert (ImageDecode().max_pixels, libraries.PILLOW_MAX_PIXELS) == (
        MAX_PIXELS,
        PILLOW_MAX_PIXELS,
    )
    Image.new("RGB", (40, 30)).save(photos / "cats/large.jpg")
    report = pack(Folder(source=photos, max_pixels=1199), tmp_path / "small")
    assert (report.num_samples, list(broken(tmp_path / "small"))) == (3, ["cats/large.jpg"])
    plain = pack(Folder(source=photos), tmp_path / "out")
    assert plain.num_samples == 4
    with pytest.raises(UserError, match="with other settings"):  # other samples would be in it
        pack(Folder(source=photos, max_pixels=1199), tmp_path / "out")
    argv = ["pack", str(photos), str(tmp_path / "cli"), "--max-pixels", "1200", "--workers", "1"]
    assert main(argv) == 0
    assert len(keys(tmp_path / "cli")) == 4
    with pytest.raises(UserError, match="max_pixels is 0, but must be at least 1"):
        pack(Folder(source=photos, max_pixels=0), tmp_path / "none")


@pytest.mark.slow
def test_a_photograph_of_72_million_pixels(photos: Path, tmp_path: Path):
    Image.new("RGB", (9000, 8000)).save(photos / "cats/phone.jpg")
    plain = pack(Folder(source=photos), tmp_path / "plain")
    assert (plain.num_samples, plain.num_broken) == (3, 1)
    assert "--max-pixels" in plain.broken[0][1]
    whole = pack(Folder(source=photos, max_pixels=72_000_000), tmp_path / "whole")
    assert (whole.num_samples, whole.num_broken) == (4, 0)
    assert verify_shards(tmp_path / "whole", decode=True).problems == []
    # A JPEG is scaled while it is decoded, so no bound is in the way of a small copy.
    small = pack(Folder(source=photos, resize=4), tmp_path / "small")
    assert (small.num_samples, small.num_broken) == (4, 0)


@dataclass(frozen=True)
class Texts:
    """Samples of some names."""

    names: tuple[str, ...]
    ignored: ClassVar[Mapping[str, int]] = {}

    def __len__(self) -> int:
        return len(self.names)

    def sizes(self) -> Sequence[int]:
        return [1] * len(self)

    def identity(self) -> Mapping[str, Any]:
        return {"names": list(self.names)}

    def sidecars(self) -> Mapping[str, bytes]:
        return {}

    def part(self, lo: int, hi: int) -> "Texts":
        return Texts(self.names[lo:hi])

    def read(self) -> Iterator[Sample]:
        for name in self.names:
            yield Sample(name, {"txt": b"text"})


class TextSource(PackSource):
    """A source whose author does not care what readers leave out."""

    kind: Literal["texts"] = "texts"
    names: tuple[str, ...]

    def open(self) -> Texts:
        return Texts(self.names)


def numbered(count: int, **settings: int) -> TextSource:
    return TextSource(names=tuple(f"{number:04d}" for number in range(count)), **settings)


def test_enough_shards_unless_told_otherwise(tmp_path: Path):
    assert pack(numbered(513), tmp_path / "new").num_shards == 16
    assert pack(numbered(511), tmp_path / "few").num_shards == 1
    assert pack(numbered(513, shard_samples=300), tmp_path / "told").num_shards == 2
    assert [enough_shards(n, 10_000) for n in (1_000_000, 160_000, 16_000)] == [
        10_000,
        10_000,
        1000,
    ]
    sprites = Sprites(count=1000)
    assert (sprites.shard_samples, sprites.MAX_SHARD_SAMPLES) == (None, 1000)


def test_a_pack_of_the_former_default_goes_on(tmp_path: Path):
    """Before, all folders were cut at 10,000 samples; their pack.json and plan.json say so."""
    old = pack(numbered(513, shard_samples=10_000), tmp_path / "old")
    assert old.num_shards == 1
    assert pack(numbered(513), tmp_path / "old") == old
    identity = json.loads((tmp_path / "old/pack.json").read_bytes())["identity"]
    (tmp_path / "stopped/_stage").mkdir(parents=True)
    (tmp_path / "stopped/_stage/plan.json").write_text(json.dumps(identity))
    assert pack(numbered(513), tmp_path / "stopped").dataset_id == old.dataset_id
    with pytest.raises(UserError, match="with other settings"):
        pack(numbered(514), tmp_path / "old")
    with pytest.raises(UserError, match="with other settings"):
        pack(numbered(513, shard_samples=9_999), tmp_path / "old")


def packed_by_the_verb(out: Path, names: tuple[str, ...]) -> int:
    def source_type() -> TextSource:
        return TextSource(names=names, shard_samples=2)

    options = {"source_type": source_type, "settings": (), "split": None, "workers": 1}
    return verb.run(argparse.Namespace(out=str(out), json=False, **options))


def test_a_pack_fails_if_its_index_finds_less(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """What is lost is named by its keys, wherever it lies."""
    names = ("a", "b", "c", "__d__/1", "e", "__f__/1", ".g", "h")
    assert packed_by_the_verb(tmp_path / "out", names) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("FAILED  8 samples in 4 shards were packed, but the index does not")
    assert lines[1:5] == ["lost, by their keys", "  __d__/1", "  __f__/1", "  .g"]
    assert packed_by_the_verb(tmp_path / "out", names) == 1  # also if nothing is left to be written
    assert packed_by_the_verb(tmp_path / "sound", ("a", "b", "c")) == 0
    with pytest.raises(UserError, match="Two samples in a row have the key b"):
        pack(TextSource(names=("a", "b", "b")), tmp_path / "twice")


def test_a_path_is_a_folder(
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    assert main(["pack", "photos", "bare", "--workers", "1"]) == 0
    assert main(["pack", "folder", "photos", "named", "--workers", "1"]) == 0
    assert main(["pack", "--workers", "1", "photos", "options-first"]) == 0
    shards = [Path(out, "shard-000000.tar").read_bytes() for out in ("bare", "named")]
    assert shards[0] == shards[1] == Path("options-first/shard-000000.tar").read_bytes()
    capsys.readouterr()
    assert main(["pack", "photo", "out"]) == 2
    assert "The source photo is not a folder" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        main(["pack", "--help"])
    assert "`pack PHOTOS OUT` is `pack folder PHOTOS OUT`" in " ".join(
        capsys.readouterr().out.split()
    )


def test_a_folder_with_the_name_of_a_kind(
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    photos.rename("sprites")
    argv = ["out", "--workers", "1"]
    assert main(["pack", "sprites", *argv, "--count", "2"]) == 0  # the kind wins
    assert "the folder of that name is ./sprites" in capsys.readouterr().err
    assert main(["pack", "./sprites", "other", "--workers", "1"]) == 0
    assert keys(tmp_path / "other") == ["cats/0", "cats/1", "dogs/0"]
    Path("sprites").rename("hf")
    with pytest.raises(SystemExit, match="2"):
        main(["pack", "hf", "out"])
    assert "the folder of that name is ./hf" in capsys.readouterr().err
