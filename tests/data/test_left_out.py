"""What a sound tar holds and no sample shows: each reason counted, named, shown with its remedy.

Besides: hard links are members, sidecars break no sample apart, and a shard without any of this
gives what it always gave.
"""

import io
import json
import shutil
import subprocess
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.__main__ import main
from pipeline.common.errors import UserError
from pipeline.config import read_config
from pipeline.data.index import Index, build_index, left_out
from pipeline.data.index.splits import SplitSpec
from pipeline.data.index.table import ShardTable
from pipeline.data.index.tar import group_samples, why_left_out
from pipeline.data.index.tar_scan import TarScan
from pipeline.data.index.verify import verify_shards
from pipeline.train import main as train
from pipeline.training.build import check_data
from tests.processes import ROOT
from tests.shards import png, tiny_image

RELEASED = ROOT / "tests" / "released" / "93dd2d6" / "data"
DIALECTS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
FIFO, DEVICE, FOLDER = tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE
SYMBOLIC, HARD, FILE = tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.REGTYPE
# Reasons of members that are delivered all the same.
KEPT = {
    "second_picture",
    *("dotted_suffix", "label_not_integer", "label_minus_one", "text_not_utf8", "json_invalid"),
}


class Entry(NamedTuple):
    """An entry of a tar; content of a file, or the name that a link names."""

    name: str
    content: bytes | str = b""
    type: bytes = FILE


def write(path: Path, entries: Iterable[Entry], dialect: int = tarfile.GNU_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=dialect) as tar:
        for name, content, kind in entries:
            info = tarfile.TarInfo(name)
            info.type = kind
            if isinstance(content, str):
                info.linkname = content
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def files(names: Sequence[str]) -> list[Entry]:
    return [Entry(name, name.encode()) for name in names]


def samples_of(path: Path) -> tuple[list[tuple[str, dict[str, bytes]]], dict[str, int]]:
    """(key, contents) of each sample, and counts by reason."""
    data = path.read_bytes()
    scan = TarScan(lambda offset, size: data[offset : offset + size], len(data))
    found = [
        (sample.key, {name: data[at : at + n] for name, (at, n) in sample.members.items()})
        for sample in group_samples(scan)
    ]
    assert scan.damage == []
    return found, {reason: c["count"] for reason, c in scan.left_out.counts.items()}


def test_every_reason_has_words_and_every_loss_a_remedy():
    for name, reason in left_out.REASONS.items():
        assert reason.words
        assert bool(reason.remedy) or not reason.is_loss, name
    assert not KEPT - left_out.REASONS.keys()


def test_a_folder_named_background_is_counted_and_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """A foreign tar: webdataset's rule stays, so these pictures are no samples."""
    names = [f"{folder}/{n}.png" for folder in ("__background__", "cats") for n in range(10)]
    write(tmp_path / "a.tar", [*files(names), Entry("__meta__", b"{}")])
    assert main(["index", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("WARN  10 samples in 1 shard")
    assert "10 files: in a folder like `__x__`" in printed
    assert "as __background__/0.png in a.tar; rename the folder" in printed
    index = Index.open(tmp_path)
    counts = {name: found["count"] for name, found in index.left_out.items()}
    assert counts == {"dunder_name": 10, "metadata": 1}
    assert len(index.left_out_lines()) == 2
    assert len(index.left_out_lines(only_losses=True)) == 1  # webdataset's own metadata is none
    shown = verify_shards(tmp_path)
    assert (shown.problems, shown.left_out) == ([], index.left_out_lines())


@pytest.mark.parametrize(
    ("names", "is_shown"),
    [
        ([f"IMG_2024.{n:05d}.png" for n in range(200)] + [f"{n:05d}.png" for n in range(50)], True),
        ([f"v1.{n:03d}.JPG" for n in range(30)], True),
        ([f"{n:03d}.{side}.png" for n in range(20) for side in ("left", "right")], True),
        ([f"a.{n:03d}.npy" for n in range(30)], True),
        ([f"{n}{end}" for n in range(30) for end in (".png", ".seg.png", ".depth.npy")], False),
        ([f"{n}.{n}.json" for n in range(30)], False),
    ],
    ids=["dots", "none-plain", "two-views", "arrays", "kinds-of-members", "no-pictures"],
)
def test_pictures_under_dotted_suffixes_are_said_where_that_is_a_mistake(
    tmp_path: Path, names: list[str], is_shown: bool
):
    write(tmp_path / "a.tar", files(names))
    index = build_index(tmp_path)
    dotted = [name for name in names if name.count(".") > 1 and not name.endswith("json")]
    found = index.left_out.get("dotted_suffix")
    assert (0 if found is None else found["count"]) == len(dotted)
    lines = index.left_out_lines()
    assert bool(lines) == is_shown
    if is_shown:
        assert lines[0].startswith(f"{len(dotted)} files: ending in .png or the like under another")
        assert f"as {dotted[0]} in a.tar; use one dot per name" in lines[0]


def test_the_index_prints_members_per_suffix(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write(tmp_path / "a.tar", files([n for i in range(30) for n in (f"{i}.png", f"x.{i}.jpg")]))
    main(["index", str(tmp_path)])
    assert "members per suffix          png 30, *.jpg 30" in capsys.readouterr().out
    main(["index", str(tmp_path), "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["suffixes"]["png"] == 30
    assert report["left_out"] == {
        "dotted_suffix": {"count": 30, "example": "x.0.jpg in a.tar"},
    }


LONG = "folder" * 15 + "/" + "name" * 20


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(
    ("first", "link"),
    [("./a", "./a"), ("./a", "a"), ("a", "./a"), ("x/a", "x/./a"), ("ümlaut", "ümlaut")],
)
def test_a_hard_link_is_a_member(tmp_path: Path, dialect: int, first: str, link: str):
    entries = [
        Entry(f"{first}.png", b"picture"),
        Entry("b.png", f"{link}.png", HARD),
        Entry("c.PNG", "b.png", HARD),  # a chain
        Entry("c.txt", "./c.PNG", HARD),
    ]
    found, counts = samples_of(write(tmp_path / "a.tar", entries, dialect))
    assert found == [
        (first, {"png": b"picture"}),
        ("b", {"png": b"picture"}),
        ("c", {"png": b"picture", "txt": b"picture"}),
    ]
    assert counts == {}


@pytest.mark.parametrize("dialect", DIALECTS[1:])
def test_links_with_long_names(tmp_path: Path, dialect: int):
    """GNU tar's members of type K and L, and PAX linkpath and path."""
    entries = [Entry(f"{LONG}1.png", b"picture"), Entry(f"{LONG}2.png", f"{LONG}1.png", HARD)]
    entries += [Entry("short.png", f"{LONG}2.png", HARD)]
    path = write(tmp_path / "a.tar", entries, dialect)
    found, counts = samples_of(path)
    assert [key for key, _ in found] == [f"{LONG}1", f"{LONG}2", "short"]
    assert {content["png"] for _, content in found} == {b"picture"}
    assert counts == {}


def test_the_last_of_several_targets_counts_as_when_unpacked(tmp_path: Path):
    entries = [Entry("a.png", b"old"), Entry("b.txt"), Entry("a.png", b"new")]
    path = write(tmp_path / "a.tar", [*entries, Entry("c.png", "a.png", HARD)])
    assert dict(samples_of(path)[0])["c"] == {"png": b"new"}


def test_links_that_hold_nothing_are_counted_with_their_remedy(tmp_path: Path):
    entries = [
        Entry("early.png", "late.png", HARD),
        Entry("late.png", b"x"),
        Entry("none.png", "no-such.png", HARD),
        Entry("of-a-link.png", "soft.png", HARD),
        Entry("soft.png", "late.png", SYMBOLIC),
        Entry("folder", "..", SYMBOLIC),
        Entry("itself.png", "itself.png", HARD),
        Entry("pipe", type=FIFO),
        Entry("null", type=DEVICE),
        Entry("sub", type=FOLDER),
        Entry("what.png", type=b"Z"),
    ]
    write(tmp_path / "a.tar", entries)
    found, counts = samples_of(tmp_path / "a.tar")
    assert found == [("late", {"png": b"x"})]
    assert counts == {"hard_link": 4, "symbolic_link": 2, "special": 2, "unknown_type": 1}
    lines = build_index(tmp_path).left_out_lines(only_losses=True)
    assert len(lines) == 3
    assert "2 files: symbolic link" in lines[0]
    assert "--dereference` (-h)" in lines[0]
    assert "as early.png in a.tar; write the tar again with `tar --hard-dereference`" in lines[1]


def test_gnu_tars_default_for_linked_files(tmp_path: Path):
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "a.png").write_bytes(png(tiny_image(0)))
    (tree / "b.png").hardlink_to(tree / "a.png")
    (tree / "c.png").symlink_to("a.png")
    (tmp_path / "s").mkdir()
    program = shutil.which("tar")
    if program is None:
        pytest.skip("tar is not installed")
    subprocess.run([program, "-C", tree, "-cf", tmp_path / "s" / "a.tar", "."], check=True)
    index = build_index(tmp_path / "s", deep=True)
    assert sorted(index.table(0).keys()) == ["./a", "./b"]
    assert {name: found["count"] for name, found in index.left_out.items()} == {"symbolic_link": 1}
    ranges = index.table(0).ranges_of(("png",))
    assert len(set(ranges.crc32.tolist())) == len(set(ranges.offset.tolist())) == 1
    assert ranges.crc32[0] >= 0
    assert verify_shards(tmp_path / "s", decode=True).problems == []


def test_a_link_has_the_label_the_checksum_and_the_split_of_its_content(tmp_path: Path):
    """Programs that find equal files make one file of all labels of a class."""
    split = SplitSpec(by="json.group", fractions={"train": 0.5, "held_out": 0.5})
    entries = [Entry("0.png", b"p"), Entry("0.cls", b"7"), Entry("0.json", b'{"group": "g"}')]
    for number in range(1, 40):
        entries += [
            Entry(f"{number}.{suffix}", f"0.{suffix}", HARD) for suffix in ("png", "cls", "json")
        ]
    entries += [Entry("x.txt", b"3"), Entry("x.cls", "x.txt", HARD)]
    entries += [Entry("x.json", "0.json", HARD)]
    write(tmp_path / "a.tar", entries)
    table = build_index(tmp_path, deep=True, split=split).table(0)
    assert table.labels.tolist() == [7] * 40 + [3]
    assert len(set(table.split_numbers.tolist())) == 1
    assert len(set(table.ranges_of(("cls",)).crc32[:40].tolist())) == 1
    assert verify_shards(tmp_path).problems == []


SIDECARS = (
    *("._{name}", "__MACOSX/{name}", ".DS_Store", "Thumbs.db", "desktop.ini"),
    *(".AppleDouble/{name}", "@eaDir/{name}", "._.DS_Store", "Desktop.INI"),
)


@pytest.mark.parametrize("folder", ["", "cats/", "./cats/deep.folder/"])
def test_sidecars_never_become_samples_and_break_none_apart(tmp_path: Path, folder: str):
    entries: list[Entry] = []
    for number in range(len(SIDECARS)):
        entries.append(Entry(f"{folder}{number}.png", b"p"))
        name = SIDECARS[number].format(name=f"{number}.png")
        entries += [Entry(f"{folder}{name}", b"sidecar"), Entry(f"{folder}{number}.txt", b"t")]
    found, counts = samples_of(write(tmp_path / "a.tar", entries))
    assert found == [
        (f"{folder}{number}", {"png": b"p", "txt": b"t"}) for number in range(len(SIDECARS))
    ]
    assert counts == {"sidecar": len(SIDECARS)}


def test_other_names_that_begin_with_a_dot_are_counted_and_break_nothing_apart(tmp_path: Path):
    names = ["cats/a.png", "cats/.hidden.png", "cats/a.txt", ".gitignore", "cats/README", "..png"]
    found, counts = samples_of(write(tmp_path / "a.tar", files(names)))
    assert [key for key, _ in found] == ["cats/a"]  # webdataset would make a sample `cats/`
    assert counts == {"no_suffix": 4}
    assert why_left_out("folder/") == why_left_out("") == "empty_name"


def label_shard(path: Path) -> Path:
    labels = [b"cat", b"3.0", b"-1", b"7\n", b"0", b"9" * 18, b"9" * 20, b"", b"\xff", b"x" * 99]
    entries: list[Entry] = []
    for number, label in enumerate(labels):
        entries += [Entry(f"{number}.png", b"p"), Entry(f"{number}.cls", label)]
    entries += [Entry("t0.txt", "caf\xe9".encode("latin-1")), Entry("t1.txt", "café".encode())]
    entries += [
        Entry("j0.json", b"{" + b" " * 100_000),
        Entry("j1.json", b'{"a": 1}'),
        Entry("j2.json", b"\xff"),
    ]
    entries += [Entry("x.seg.txt", b"\xff"), Entry("._y.cls", b"sidecar")]
    return write(path, entries)


@pytest.mark.parametrize("deep", [False, True])
def test_labels_and_texts_that_cannot_be_kept_are_counted(tmp_path: Path, deep: bool):
    label_shard(tmp_path / "a.tar")
    index = build_index(tmp_path, deep=deep)
    counts = {name: found["count"] for name, found in index.left_out.items()}
    expected = {"sidecar": 1, "label_not_integer": 6, "label_minus_one": 1, "text_not_utf8": 1}
    assert counts == expected | ({"json_invalid": 2} if deep else {})
    assert index.left_out["label_not_integer"]["example"] == "0.cls in a.tar"
    labels = index.table(0).labels.tolist()[:10]
    assert labels == [-1, -1, -1, 7, 0, 999_999_999_999_999_999, -1, -1, -1, -1]
    assert "cls" in index.table(0).members(0)  # the text stays in the shard
    assert any("2 files: .json that cannot be" in line for line in index.left_out_lines()) == deep


def test_counts_stay_over_a_new_split_and_come_with_a_deep_index(tmp_path: Path):
    label_shard(tmp_path / "a.tar")
    first = build_index(tmp_path)
    again = build_index(tmp_path, split=SplitSpec(seed=5))
    assert again.left_out == first.left_out
    assert "json_invalid" in build_index(tmp_path, deep=True).left_out
    assert "json_invalid" in build_index(tmp_path).left_out  # the deep table is kept


def test_counts_of_several_shards_are_summed(tmp_path: Path):
    write(tmp_path / "a.tar", files(["0.png"]))
    write(tmp_path / "b.tar", files(["1.png", "x/._1.png", "README"]))
    write(tmp_path / "c.tar", files(["2.png", "._2.png"]))
    found = build_index(tmp_path).left_out
    assert list(found.items()) == [
        ("sidecar", {"count": 2, "example": "x/._1.png in b.tar"}),
        ("no_suffix", {"count": 1, "example": "README in b.tar"}),
    ]


def test_a_name_begins_no_line_and_gives_a_terminal_no_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    write(tmp_path / "a.tar", files(["0.png", "READ\nME\x1b[31m", "1\n.cls"]))
    assert main(["index", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert r"such as READ\nME\x1b[31m in a.tar;" in printed
    assert r"such as 1\n.cls in a.tar;" in printed


# --- what was written before


def test_an_index_of_a_released_version_is_read_and_a_new_one_is_the_same(tmp_path: Path):
    old = Index.open(RELEASED)
    assert (old.left_out, old.left_out_lines()) == ({}, [])
    folder = Path(shutil.copytree(RELEASED, tmp_path / "data"))
    new = build_index(folder, deep=True, split=old.split_spec)
    assert new.dataset_id == old.dataset_id
    assert [shard.left_out for shard in new.shards] == [{}] * 3
    for number in range(len(old.shards)):
        one, two = old.table(number), new.table(number)
        assert one.samples() == two.samples()
        assert one.labels.tolist() == two.labels.tolist()
        assert one.split_numbers.tolist() == two.split_numbers.tolist()
        assert (one.is_counted, two.is_counted) == (False, True)  # the old table was replaced


def test_only_tables_without_counts_are_written_again(tmp_path: Path):
    folder = Path(shutil.copytree(RELEASED, tmp_path / "data"))
    build_index(folder)
    times = [path.stat().st_ctime_ns for path in sorted((folder / "index").rglob("*.arrow"))]
    build_index(folder)
    assert times == [p.stat().st_ctime_ns for p in sorted((folder / "index").rglob("*.arrow"))]
    tables = (folder / "index" / "tables").glob("*.arrow")
    assert all(ShardTable(path).is_counted for path in tables)


# --- suffixes that a training wants


def suffix_set(folder: Path, counts: dict[str, int], both: int = 0) -> Index:
    names = [f"{s}{n:04d}.{s}" for s, count in counts.items() for n in range(count)]
    names += [f"both{n:04d}.{s}" for n in range(both) for s in counts]
    write(folder / "a.tar", files(names))
    return build_index(folder)


def test_mostly_unwanted_members_are_refused_with_share_and_remedy(tmp_path: Path):
    index = suffix_set(tmp_path, {"jfif": 45, "jpg": 15})
    with pytest.raises(UserError) as error:
        index.check_suffixes(["jpg", "png"], 0.01, "export.suffixes")
    text = str(error.value)
    assert "At least 45 of the 60 samples (75 %)" in text
    assert "suffix of jpg, png (export.suffixes); at most 1 % may lack it" in text
    assert "has: jfif (45), jpg (15). Name those that are to be read in export.suffixes" in text
    index.check_suffixes(["jpg", "jfif"], 0.01)
    index.check_suffixes(["jpg"], 0.75)
    index.check_suffixes(["jpg"])


def test_names_with_many_dots_are_no_suffixes_to_name(tmp_path: Path):
    write(tmp_path / "a.tar", files([f"v1.{number:03d}.webp" for number in range(30)]))
    index = build_index(tmp_path)
    with pytest.raises(UserError, match="more than one dot: use one dot per name") as error:
        index.check_suffixes(["jpg", "webp"])
    assert "Name those" not in str(error.value)


def test_a_second_picture_of_a_sample_is_counted(tmp_path: Path):
    names = ["1.jpg", "1.png", "1.txt", "2.png", "2.seg.png", "3.jpg", "3.npy"]
    write(tmp_path / "a.tar", files(names))
    index = build_index(tmp_path)
    assert index.num_samples == 3
    [line] = index.left_out_lines()
    assert line.startswith("1 file: picture of a sample that has one under another suffix")
    assert "such as 1.png in a.tar; if both are samples, pack the folder" in line
    assert index.left_out_lines(only_losses=True) == []


def test_tables_decide_where_counts_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    index = suffix_set(tmp_path / "s", {"jpg": 20, "png": 20, "txt": 20}, both=40)
    # jpg 60 and png 60 of 100 samples: by these counts all could have one of both.
    index.check_suffixes(["jpg", "png"], 0.2)
    with pytest.raises(UserError, match=r"At least 20 of the 100 samples \(20 %\)"):
        index.check_suffixes(["jpg", "png"], 0.19)
    none = suffix_set(tmp_path / "t", {"jpg": 20, "png": 20})
    monkeypatch.setattr(none, "table", lambda _: pytest.fail("the counts decide"))
    none.check_suffixes(["jpg"], 0.5)
    with pytest.raises(UserError, match="At least 20 of the 40"):
        none.check_suffixes(["jpg"], 0.49)


def test_only_samples_of_the_split_count(tmp_path: Path):
    """A split by metadata may put all that is unwanted elsewhere."""
    entries: list[Entry] = []
    for number in range(60):
        suffix, group = ("jpg", "a") if number % 3 else ("gif", "b")
        entries += [Entry(f"{number}.{suffix}", b"x")]
        entries += [Entry(f"{number}.json", b'{"source": "%s"}' % group.encode())]
    write(tmp_path / "a.tar", entries)
    splits = (
        SplitSpec(by="json.source", fractions={"one": 0.5, "two": 0.5}, seed=seed)
        for seed in range(50)
    )
    apart = next(split for split in splits if split.number_of("a") != split.number_of("b"))
    index = build_index(tmp_path, split=apart)
    of_jpg = max(index.samples_per_split(), key=lambda name: index.samples_per_split()[name])
    index.check_suffixes(["jpg"], 0.0, split=of_jpg)
    other = "two" if of_jpg == "one" else "one"
    with pytest.raises(UserError, match="No sample"):
        index.check_suffixes(["jpg"], 0.5, split=other)
    with pytest.raises(UserError, match="At least 20 of the 60"):
        index.check_suffixes(["jpg"], 0.1)


def run_config(folder: Path, **options: object) -> Path:
    path = folder / "run.yaml"
    lines = {
        "run_dir": f"{folder}/run",
        "batch_size": 10,
        "num_steps": 1000,
        "model": "{backbone: {kind: mlp}, bottleneck: {kind: deterministic}}",
        "data": f"{{path: {folder}, split: all, decode: {{kind: image, size: 8}}}}",
        "evaluation": "{split: all}",
    } | options
    path.write_text("".join(f"{name}: {value}\n" for name, value in lines.items()))
    return path


def test_a_training_starts_only_if_enough_samples_have_a_wanted_member(tmp_path: Path):
    index = suffix_set(tmp_path, {"jpg": 98, "gif": 2})
    config = read_config(run_config(tmp_path))
    with pytest.raises(UserError, match=r"2 of the 100 samples \(2 %\).*at most 1 % may lack it"):
        check_data(config, [index])
    # The run stops above a fraction of at least 1,000 delivered samples: this one delivers 200.
    check_data(config.model_copy(update={"num_steps": 20}), [index])
    check_data(read_config(tmp_path / "run.yaml", ["data.max_bad_fraction=0.02"]), [index])


@pytest.mark.slow
def test_a_run_says_at_its_start_what_was_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    entries = [Entry(f"{number}.png", png(tiny_image(number))) for number in range(12)]
    entries += [Entry("__background__/0.png", b"x"), Entry("._0.png", b"sidecar")]
    write(tmp_path / "a.tar", entries)
    build_index(tmp_path)
    config = run_config(tmp_path, num_steps=1, monitor="{wandb: {mode: disabled}}")
    assert train([str(config)]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "file:" in line]
    assert len(said) == 1  # only what may be a loss
    assert f"{tmp_path}: 1 file: in a folder like `__x__`" in said[0]
    assert train([str(config), "data.decode.suffixes=[webp, gif]", "run_dir=none"]) == 2
    assert "No sample of" in capsys.readouterr().err


# --- nothing is lost without a count

PARTS = ("a", "b", "._a", "__x__", "cats", ".hid", "c.d", "__MACOSX", "é")
SUFFIXES = (".png", ".PNG", ".txt", ".x.jpg", "", ".", ".json", ".db")
names = st.builds(
    lambda folders, base, end: "/".join([*folders, base + end]),
    st.lists(st.sampled_from(PARTS), max_size=2),
    st.sampled_from(PARTS),
    st.sampled_from(SUFFIXES),
)
kinds = st.sampled_from([FILE, FILE, FILE, FILE, HARD, HARD, SYMBOLIC, FIFO, FOLDER, b"Z"])


@settings(max_examples=200, deadline=None)
@given(st.data(), st.sampled_from(DIALECTS))
def test_delivered_and_counted_are_all_members(data: st.DataObject, dialect: int):
    entries: list[Entry] = []
    for kind in data.draw(st.lists(kinds, max_size=20)):
        name = data.draw(names)
        is_link = kind in (HARD, SYMBOLIC)
        target = data.draw(st.sampled_from([e.name for e in entries] or ["nowhere"]))
        content = target if is_link else f"{len(entries)}".encode() if kind == FILE else b""
        entries.append(Entry(name, content, kind))
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=dialect) as tar:
        for entry in entries:
            info = tarfile.TarInfo(entry.name)
            info.type = entry.type
            if isinstance(entry.content, str):
                info.linkname = entry.content
            else:
                info.size = len(entry.content)
            tar.addfile(
                info, io.BytesIO(entry.content if isinstance(entry.content, bytes) else b"")
            )
    tar_bytes = buffer.getvalue()
    scan = TarScan(lambda offset, size: tar_bytes[offset : offset + size], len(tar_bytes))
    samples = list(group_samples(scan))
    delivered = sum(len(sample.members) for sample in samples)
    lost = sum(found["count"] for name, found in scan.left_out.counts.items() if name not in KEPT)
    twice = sum(fault.kind == "duplicate_member" for fault in scan.damage)
    assert delivered + lost + twice == sum(entry.type != FOLDER for entry in entries)
    assert len(scan.damage) == twice
    # Every delivered content is that of a file of this name, or of one that it is linked to.
    contents = {entry.content for entry in entries if entry.type == FILE}
    for sample in samples:
        for at, size in sample.members.values():
            assert tar_bytes[at : at + size] in contents
