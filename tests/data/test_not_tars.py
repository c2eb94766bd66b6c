"""Files that are no tars: said in one line each, beside good shards and alone."""

import bz2
import gzip
import lzma
import tarfile
import zipfile
from pathlib import Path

import pytest

from pipeline.__main__ import main
from pipeline.common.errors import UserError
from pipeline.data.index import Index, build_index
from pipeline.data.index.tar_header import OTHER_FORMATS
from pipeline.data.index.verify import verify_shards
from pipeline.data.storage.patterns import find_shards
from tests.shards import write_tiny_shards

RANGES = "byte ranges cannot be read"


@pytest.fixture
def tar(tmp_path: Path) -> bytes:
    write_tiny_shards(tmp_path / "one", (3,))
    return (tmp_path / "one" / "tiny-0000.tar").read_bytes()


def zipped(path: Path, tar: bytes) -> bytes:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a.png", tar[:99])
    return path.read_bytes()


def made_by_libraries(tmp_path: Path, tar: bytes) -> dict[str, bytes]:
    return {
        "gzip": gzip.compress(tar),
        "bzip2": bz2.compress(tar),
        "xz": lzma.compress(tar),
        "zip": zipped(tmp_path / "x.zip", tar),
    }


def test_other_formats_under_the_name_of_a_tar(tmp_path: Path, tar: bytes):
    folder = tmp_path / "s"
    folder.mkdir()
    contents = made_by_libraries(tmp_path, tar)
    # Those that Python cannot write: as they begin.
    contents |= {
        text.split(" ")[0].strip(":"): magic + bytes(range(256)) * 9
        for magic, text in OTHER_FORMATS.items()
        if text.split(":")[0] not in contents
    }
    contents |= {"noise": bytes(range(1, 256)) * 30, "short": b"abc", "empty": b""}
    (folder / "good.tar").write_bytes(tar)
    for name, content in contents.items():
        (folder / f"{name}.tar").write_bytes(content)
    index = build_index(folder)
    assert index.num_samples == 3
    said = {name.removesuffix(".tar"): damage for name, damage in index.damage}
    assert said.keys() == contents.keys()
    assert len(index.damage) == len(contents)  # one line each
    assert {damage.kind for damage in said.values()} == {"not_tar"}
    for name in ("gzip", "bzip2", "xz", "zstd", "lz4"):
        assert said[name].text == f"is no tar: {name}: decompress it; {RANGES}"
    for name in ("zip", "7z", "rar"):
        assert said[name].text.startswith(f"is no tar: {name}: unpack it and write a tar")
    assert said["noise"].text.startswith("is no tar: it begins with b'\\x01\\x02")
    assert said["empty"].text == "is no tar: it is empty"
    problems = verify_shards(folder).problems
    assert len(problems) == len(contents)  # not again by tarfile
    assert f"gzip.tar: is no tar: gzip: decompress it; {RANGES}" in problems


def test_a_tar_whose_name_begins_like_another_format_is_a_tar(tmp_path: Path):
    with tarfile.open(tmp_path / "a.tar", "w") as file:
        file.addfile(tarfile.TarInfo("BZh.png"))
    data = bytearray((tmp_path / "a.tar").read_bytes())
    assert build_index(tmp_path).damage == []
    data[150] ^= 1  # of the checksum: a damaged tar, still no bzip2
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(UserError, match="begins with b'BZh.png"):
        build_index(tmp_path)


def test_an_index_without_a_sample_is_no_success(
    tmp_path: Path, tar: bytes, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "s").mkdir()
    for number in range(5):
        (tmp_path / "s" / f"{number}.tar").write_bytes(gzip.compress(tar))
    assert main(["index", str(tmp_path / "s")]) == 2
    said = capsys.readouterr().err
    assert "no sample in 5 shards. 0.tar is no tar: gzip: decompress it" in said
    assert "2 more of the kind" in said
    assert not (tmp_path / "s" / "index" / "manifest.json").exists()


def test_without_a_sample_the_reasons_are_said(tmp_path: Path):
    with tarfile.open(tmp_path / "a.tar", "w") as file:
        for name in ("__background__/0.png", "__background__/1.png", "README"):
            file.addfile(tarfile.TarInfo(name))
    with pytest.raises(UserError) as error:
        build_index(tmp_path)
    assert "no sample in 1 shard. 2 files: in a folder like `__x__`" in str(error.value)
    assert "1 file: without a suffix" in str(error.value)
    with tarfile.open(tmp_path / "a.tar", "w"):
        pass
    with pytest.raises(UserError, match="No member at all"):
        build_index(tmp_path)


@pytest.mark.parametrize(
    ("end", "kind"),
    [("tar.gz", "gzip"), ("tgz", "gzip"), ("tar.zst", "zstd"), ("tar.bz2", "bzip2"), ("txz", "xz")],
)
def test_compressed_tars_alone_are_refused(
    tmp_path: Path, end: str, kind: str, capsys: pytest.CaptureFixture[str]
):
    for number in range(4):
        (tmp_path / f"{number}.{end}").write_bytes(b"x")
    for pattern in (tmp_path, tmp_path / f"*.{end}", f"{tmp_path}/{{0..3}}.{end}"):
        assert main(["index", str(pattern)]) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert "no .tar shard found there" in said
        assert f"2.{end} ({kind}), ... (4 in all): decompress it; {RANGES}" in said
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == []


def test_compressed_tars_beside_shards_are_counted(
    tmp_path: Path, tar: bytes, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "s").mkdir()
    alone = build_index_of(tmp_path / "s", {"a.tar": tar})
    more = {"a.tar": tar, "a.tar.gz": b"its copy", "b.tar.gz": b"x", "c.tar.zst": b"x"}
    index = build_index_of(tmp_path / "s", more)
    assert (index.dataset_id, index.num_samples) == (alone.dataset_id, 3)
    assert index.left_out["compressed"]["count"] == 2  # the copy of a.tar is not missed
    capsys.readouterr()
    assert main(["index", f"{tmp_path}/s/{{a.tar,b.tar.gz}}"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("WARN  3 samples")
    assert f"1 file: compressed, and {RANGES}, such as b.tar.gz; decompress it" in printed


def test_a_folder_that_is_called_like_a_shard_is_passed_over(tmp_path: Path, tar: bytes):
    (tmp_path / "unpacked.tar").mkdir()
    (tmp_path / "a.tar").write_bytes(tar)
    for pattern in (tmp_path, tmp_path / "*.tar"):
        assert find_shards(pattern).names == ("a.tar",)


def build_index_of(folder: Path, contents: dict[str, bytes]) -> Index:
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return build_index(folder)


def test_what_macos_leaves_beside_a_shard_is_no_shard(tmp_path: Path, tar: bytes):
    (tmp_path / "a.tar").write_bytes(tar)
    (tmp_path / "._a.tar").write_bytes(b"\0\x05\x16\x07")
    assert find_shards(tmp_path).names == ("a.tar",)
    assert build_index(tmp_path).damage == []


def test_compressed_tars_in_a_store_that_can_list(tar: bytes):
    fsspec = pytest.importorskip("fsspec")
    files = fsspec.filesystem("memory")
    for name in ("a.tar", "b.tar.gz", "only/c.tgz"):
        files.pipe(f"/not-tars/{name}", tar)
    found = find_shards("memory://not-tars")
    assert (found.names, found.compressed) == (("a.tar",), ("b.tar.gz",))
    named = find_shards("memory://not-tars/{a.tar,b.tar.gz}")
    assert (named.names, named.compressed) == (("a.tar",), ("b.tar.gz",))
    with pytest.raises(UserError, match=rf"c\.tgz \(gzip\): decompress it; {RANGES}"):
        find_shards("memory://not-tars/only")
    with pytest.raises(UserError, match=r"b\.tar\.gz \(gzip\): decompress it"):
        find_shards("http://127.0.0.1:9/b.tar.gz")
