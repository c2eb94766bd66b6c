"""pack: the same bytes for any number of workers, after any interruption; nothing lost silently."""

import hashlib
import io
import json
import tarfile
import warnings
from pathlib import Path

import cv2
import numpy as np
import pytest
import webdataset as wds
from PIL import Image

from pipeline.common.errors import UserError
from pipeline.data.decode import ImageDecode
from pipeline.data.pack.pack import pack
from pipeline.data.pack.parts import part_paths, plan_parts, write_part
from pipeline.data.pack.sources import Folder, Sprites
from pipeline.data.pack.sources.base import SUFFIXES
from pipeline.data.pack.sources.sprites import SpritesSamples


def tree(root: Path) -> dict[str, str]:
    """Every file below root with its hash."""
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def picture(size: int = 24, *, seed: int = 0, grey: bool = False) -> Image.Image:
    shape = (size, size + 6) if grey else (size, size + 6, 3)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    for number, name in enumerate(["cats/a.b.png", "cats/sub/c.JPG", "dogs/d.webp", "dogs/e.jpeg"]):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(seed=number).save(path, {"JPG": "JPEG"}.get(name[-3:]))
    (root / "cats/broken.png").write_bytes((root / "cats/a.b.png").read_bytes()[:-20])
    (root / "dogs/empty.jpg").touch()
    (root / "dogs/notes.txt").write_text("no image")
    (root / "dogs/._d.webp").write_text("hidden")
    return root


def read_tars(out: Path) -> list[dict]:
    urls = [str(path) for path in sorted(out.glob("*.tar"))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # webdataset leaves its files to the collector
        return list(wds.WebDataset(urls, shardshuffle=False, empty_check=False))


def test_folder_is_copied_byte_for_byte(folder: Path, tmp_path: Path):
    report = pack(Folder(source=folder), tmp_path / "out")
    samples = {sample["__key__"]: sample for sample in read_tars(tmp_path / "out")}
    assert list(samples) == ["cats/a%2Eb", "cats/sub/c", "dogs/d", "dogs/e"]
    for key, suffix, path, label in [
        ("cats/a%2Eb", "png", "cats/a.b.png", 0),
        ("cats/sub/c", "jpg", "cats/sub/c.JPG", 0),
        ("dogs/d", "webp", "dogs/d.webp", 1),
        ("dogs/e", "jpeg", "dogs/e.jpeg", 1),
    ]:
        assert samples[key][suffix] == (folder / path).read_bytes()
        assert samples[key]["cls"] == str(label).encode()
        assert json.loads(samples[key]["json"]) == {"path": path, "class": path.split("/")[0]}
    assert json.loads((tmp_path / "out/classes.json").read_bytes()) == ["cats", "dogs"]
    assert (report.num_samples, report.num_shards, report.num_broken) == (4, 1, 2)
    assert report.classes == ("cats", "dogs")
    assert report.ignored == {".txt": 1, "sidecar": 1}


def test_what_is_packed_is_what_the_stream_looks_for():
    assert ImageDecode().suffixes == SUFFIXES


def test_broken_images_are_listed(folder: Path, tmp_path: Path):
    report = pack(Folder(source=folder), tmp_path / "out")
    text = (tmp_path / "out/broken.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["path"] for line in lines] == ["cats/broken.png", "dogs/empty.jpg"]
    assert all(line["reason"] and "0x" not in line["reason"] for line in lines)
    assert report.broken == tuple((line["path"], line["reason"]) for line in lines)


def test_only_broken_images_is_an_error(tmp_path: Path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.png").write_bytes(b"none")
    with pytest.raises(UserError, match="None of the 1 images"):
        pack(Folder(source=tmp_path / "images"), tmp_path / "out")


def test_members_are_plain_ustar(folder: Path, tmp_path: Path):
    pack(Folder(source=folder), tmp_path / "out")
    with tarfile.open(tmp_path / "out/shard-000000.tar") as tar:
        for member in tar:
            assert (member.mtime, member.uid, member.gid, member.mode) == (0, 0, 0, 0o444)
            assert (member.uname, member.gname, member.pax_headers) == ("root", "root", {})
    data = (tmp_path / "out/shard-000000.tar").read_bytes()
    assert data[257:265] == b"ustar\x0000"


@pytest.mark.slow
def test_any_number_of_workers_gives_the_same_bytes(tmp_path: Path):
    one = pack(Sprites(count=50, seed=3, shard_samples=8), tmp_path / "1")
    three = pack(Sprites(count=50, seed=3, shard_samples=8), tmp_path / "3", workers=3)
    assert tree(tmp_path / "1") == tree(tmp_path / "3")
    assert one.dataset_id == three.dataset_id
    assert (three.num_samples, three.num_shards) == (50, 7)
    assert sum(three.num_samples_per_split.values()) == 50
    assert three.num_samples_per_split.keys() == {"train", "held_out"}


@pytest.mark.slow
def test_any_number_of_workers_packs_a_folder_to_the_same_bytes(folder: Path, tmp_path: Path):
    pack(Folder(source=folder, shard_samples=1, shuffle_seed=5), tmp_path / "folder1")
    pack(Folder(source=folder, shard_samples=1, shuffle_seed=5), tmp_path / "folder2", workers=2)
    assert tree(tmp_path / "folder1") == tree(tmp_path / "folder2")


def test_shards_of_broken_images_alone_leave_no_gap(folder: Path, tmp_path: Path):
    report = pack(Folder(source=folder, shard_samples=1), tmp_path / "out")
    names = [path.name for path in sorted((tmp_path / "out").glob("*.tar"))]
    assert names == [f"shard-00000{number}.tar" for number in range(4)]
    assert report.num_shards == 4


def test_stopped_pack_goes_on(folder: Path, tmp_path: Path):
    """Stand-in for a kill: some parts written, one torn, one published, nothing else."""
    pack(Folder(source=folder, shard_samples=1), tmp_path / "whole")
    out = tmp_path / "out"
    stage = out / "_stage"
    stage.mkdir(parents=True)
    identity = json.loads((tmp_path / "whole/pack.json").read_bytes())["identity"]
    (stage / "plan.json").write_text(json.dumps(identity))
    source = Folder(source=folder).open()
    for number in (0, 3):
        write_part(source.part(number, number + 1), stage, number)
    (stage / "part-000002.tar.tmp-0123").write_bytes(b"torn")
    part_paths(stage, 0)[0].rename(out / "shard-000000.tar")
    kept = part_paths(stage, 3)[0].stat().st_ino
    lines: list[str] = []
    pack(Folder(source=folder, shard_samples=1), out, progress=lambda line, _: lines.append(line))
    assert tree(out) == tree(tmp_path / "whole")
    # What an earlier start did stands in the share; of the speed only what this one does.
    assert [line[:19] for line in lines[:6]] == [f"pack: {n} of 6 shards" for n in range(1, 7)]
    assert [" MB/s" in line for line in lines[:6]] == [False, False, True, True, True, True]
    assert (out / "shard-000002.tar").stat().st_ino == kept  # not written again


def test_finished_pack_is_not_repeated(tmp_path: Path):
    first = pack(Sprites(count=10, shard_samples=5), tmp_path)
    before = (tmp_path / "shard-000000.tar").stat().st_mtime_ns
    assert pack(Sprites(count=10, shard_samples=5), tmp_path) == first
    assert (tmp_path / "shard-000000.tar").stat().st_mtime_ns == before


def test_another_pack_in_the_directory_is_refused(tmp_path: Path):
    pack(Sprites(count=10, shard_samples=5), tmp_path)
    with pytest.raises(UserError, match="already holds a pack of another source"):
        pack(Sprites(count=10, seed=1, shard_samples=5), tmp_path)


def test_foreign_shards_are_refused(tmp_path: Path):
    (tmp_path / "other.tar").touch()
    with pytest.raises(UserError, match=r"already holds shards .* other\.tar"):
        pack(Sprites(count=10), tmp_path)


def test_images_in_the_root_have_no_label(tmp_path: Path):
    (tmp_path / "images").mkdir()
    picture().save(tmp_path / "images/a.png")
    pack(Folder(source=tmp_path / "images"), tmp_path / "out")
    (sample,) = read_tars(tmp_path / "out")
    assert set(sample) >= {"png", "json"}
    assert "cls" not in sample
    assert not (tmp_path / "out/classes.json").exists()


def test_output_inside_the_source_is_refused(folder: Path):
    with pytest.raises(UserError, match="inside the source"):
        pack(Folder(source=folder), folder / "shards")


@pytest.mark.parametrize("name", ["shard_samples", "shard_bytes", "workers", "resize"])
def test_senseless_numbers_are_refused(folder: Path, tmp_path: Path, name: str):
    settings, options = ({}, {name: 0}) if name == "workers" else ({name: 0}, {})
    with pytest.raises(UserError, match=f"{name} is 0"):
        pack(Folder(source=folder, **settings), tmp_path / "out", **options)


def test_resize_shrinks_the_shorter_side(tmp_path: Path):
    root = tmp_path / "images"
    root.mkdir()
    picture(40).save(root / "large.jpg")
    picture(40, grey=True).save(root / "grey.webp", lossless=True)
    picture(12).save(root / "small.png")
    pack(Folder(source=root, resize=20), tmp_path / "out")
    samples = {sample["__key__"]: sample for sample in read_tars(tmp_path / "out")}
    with Image.open(io.BytesIO(samples["large"]["jpg"])) as image:
        assert (image.format, image.size, image.mode) == ("JPEG", (23, 20), "RGB")
    with Image.open(io.BytesIO(samples["grey"]["png"])) as image:
        assert (image.format, image.size) == ("PNG", (23, 20))
    assert samples["small"]["png"] == (root / "small.png").read_bytes()


def test_resize_keeps_sixteen_bits_and_alpha(tmp_path: Path):
    root, generator = tmp_path / "images", np.random.default_rng(0)
    root.mkdir()
    files = {"grey": 1, "colour": 3, "alpha": 4}
    for name, channels in files.items():
        deep = generator.integers(0, 65536, (40, 60, channels)).astype(np.uint16)
        assert cv2.imwrite(str(root / f"{name}.png"), deep)
    Image.fromarray(generator.integers(0, 256, (40, 60, 4), dtype=np.uint8)).save(root / "8.png")
    pack(Folder(source=root, resize=20), tmp_path / "out")
    samples = {sample["__key__"]: sample["png"] for sample in read_tars(tmp_path / "out")}
    for name, channels in files.items():
        decode = ImageDecode(size=[20, 30], channels=channels, dtype="uint16", resample="lanczos")
        found, expected = np.zeros((2, *decode.buffer_shape), np.uint16)
        decode.decode(samples[name], found)
        decode.decode((root / f"{name}.png").read_bytes(), expected)
        assert np.array_equal(found, expected)
    with Image.open(io.BytesIO(samples["8"])) as image, Image.open(root / "8.png") as source:
        assert np.array_equal(image, source.resize((30, 20), Image.Resampling.LANCZOS))


def test_shuffle_permutes_and_is_repeatable(folder: Path):
    plain, one, again, other = (
        [file.path for file in Folder(source=folder, shuffle_seed=seed).open().files]
        for seed in (None, 1, 1, 2)
    )
    assert plain == sorted(one)
    assert one == again
    assert len({tuple(plain), tuple(one), tuple(other)}) > 1


def test_a_changed_file_stops_the_pack(folder: Path, tmp_path: Path):
    source = Folder(source=folder).open()
    with (folder / "cats/a.b.png").open("ab") as file:
        file.write(b"more")
    with pytest.raises(UserError, match="when the folder was listed"):
        list(source.part(0, len(source)).read())


@pytest.mark.parametrize("max_bytes", [1 << 30, 5_000, 1])
@pytest.mark.parametrize("max_samples", [1, 3, 1000])
def test_plan_covers_every_sample_once_within_the_bounds(max_bytes: int, max_samples: int):
    sizes = np.random.default_rng(0).integers(0, 3_000, 50).tolist()
    ranges = plan_parts(sizes, max_bytes=max_bytes, max_samples=max_samples)
    assert [lo for lo, _ in ranges] == [0, *(hi for _, hi in ranges[:-1])]
    assert ranges[-1][1] == 50
    for lo, hi in ranges:
        assert 0 < hi - lo <= max_samples
        assert hi - lo == 1 or sum(sizes[lo:hi]) <= max_bytes


def test_plan_leaves_no_small_rest():
    lengths = [hi - lo for lo, hi in plan_parts([10] * 101, max_bytes=1 << 30, max_samples=50)]
    assert lengths == [34, 34, 33]


def test_plan_of_nothing_is_empty():
    assert plan_parts(SpritesSamples(0, 0).sizes(), max_bytes=1, max_samples=1) == []
