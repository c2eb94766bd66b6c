"""The tar reader: every dialect, every damage, and webdataset's grouping."""

import io
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from webdataset import tariterators

from pipeline.data.index.tar import group_samples
from pipeline.data.index.tar_header import BLOCK, parse_pax
from pipeline.data.index.tar_scan import TarScan

LONG = "d" * 60 + "/" + "x" * 90 + "/" + "name" * 20


def make_tar(files, dialect=tarfile.USTAR_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=dialect) as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def scan_of(data: bytes) -> TarScan:
    return TarScan(lambda offset, size: data[offset : offset + size], len(data))


def read(data: bytes):
    """([(name, content)], damage)."""
    scan = scan_of(data)
    members = [(m.name, data[m.offset : m.offset + m.num_bytes]) for m in scan]
    return members, scan.damage


def kinds(damage):
    return [fault.kind for fault in damage]


FILES = [(f"{i:03d}.bin", bytes([i + 1]) * size) for i, size in enumerate((0, 1, 511, 512, 1300))]


@pytest.mark.parametrize("dialect", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_of_every_dialect(dialect):
    files = [*FILES, ("häßlich/日本.txt", b"utf-8")]
    if dialect != tarfile.USTAR_FORMAT:
        files += [(LONG + ".jpg", b"long"), (LONG + "é.jpg", b"long and not ASCII")]
    else:
        files += [("p" * 120 + "/" + "n" * 90 + ".txt", b"prefix field")]
    assert read(make_tar(files, dialect)) == (files, [])


def test_only_files_are_members():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
            info = tarfile.TarInfo("thing")
            info.type, info.linkname, info.size = kind, "a.txt", 0
            tar.addfile(info)
        info = tarfile.TarInfo("a.txt")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"abc"))
    assert read(buffer.getvalue()) == ([("a.txt", b"abc")], [])


def test_old_headers_and_binary_sizes():
    data = bytearray(make_tar([("a.txt", b"abc"), ("b.txt", b"defg")]))
    data[257:265] = bytes(8)  # the first header becomes a pre-POSIX one
    data[BLOCK * 2 + 124 : BLOCK * 2 + 136] = b"\x80" + (4).to_bytes(11, "big")  # GNU base-256
    for start in (0, 2 * BLOCK):
        header = data[start : start + BLOCK]
        header[148:156] = b" " * 8
        data[start + 148 : start + 156] = b"%06o\0 " % sum(header)
    assert read(bytes(data)) == ([("a.txt", b"abc"), ("b.txt", b"defg")], [])


def test_pax_size_and_global_records_count():
    assert parse_pax(b"12 path=a/b\n13 size=1234\n") == {"path": b"a/b", "size": b"1234"}
    assert parse_pax(b"12 path=a/b\n99 size=1\n") is None
    buffer = io.BytesIO()
    headers = {"size": "5"}
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("a.txt")
        info.pax_headers = headers
        info.size = 5
        tar.addfile(info, io.BytesIO(b"12345"))
    data = bytearray(buffer.getvalue())
    header = data.index(b"a.txt", 2 * BLOCK)
    data[header + 124 : header + 136] = b"%011o\0" % 0  # only the PAX record knows the size now
    block = data[header : header + BLOCK]
    block[148:156] = b" " * 8
    data[header + 148 : header + 156] = b"%06o\0 " % sum(block)
    assert read(bytes(data)) == ([("a.txt", b"12345")], [])


def test_every_flipped_header_byte_costs_at_most_its_member():
    data = make_tar(FILES)
    headers = [member.offset - BLOCK for member in scan_of(data)]
    for number, header in enumerate(headers):
        others = [file for file in FILES if file != FILES[number]]
        for place in range(header, header + BLOCK):
            for bits in (0x01, 0x80, 0xFF):
                damaged = bytearray(data)
                damaged[place] ^= bits
                members, damage = read(bytes(damaged))
                if members == FILES:  # a filler of the checksum field itself
                    assert header + 148 <= place < header + 156
                    continue
                assert members == others
                assert kinds(damage) == ["bad_header"]
                stop = headers[number + 1] if number + 1 < len(headers) else len(data)
                assert damage[0].offset == header
                assert damage[0].offset + damage[0].num_bytes <= stop


def test_tarfile_would_lose_the_rest_of_the_shard():
    """The reason for a reader of our own."""
    data = bytearray(make_tar(FILES))
    header = next(m.offset for m in scan_of(bytes(data)) if m.name == "002.bin") - BLOCK
    data[header] ^= 1
    with tarfile.open(fileobj=io.BytesIO(bytes(data))) as tar:
        assert tar.getnames() == ["000.bin", "001.bin"]
    assert [name for name, _ in read(bytes(data))[0]] == [
        name for name, _ in FILES if name != "002.bin"
    ]


@pytest.mark.parametrize("dialect", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT])
def test_every_truncation_is_reported_and_keeps_what_is_whole(dialect):
    files = [*FILES, ("é" * 60 + ".bin", b"pax")] if dialect == tarfile.PAX_FORMAT else FILES
    data = make_tar(files, dialect)
    ends = [member.offset + member.num_bytes for member in scan_of(data)]
    marker_end = -(-ends[-1] // BLOCK) * BLOCK + 2 * BLOCK
    for cut in {c + d for c in range(0, len(data), BLOCK) for d in (0, 1, 511)}:
        members, damage = read(data[:cut])
        assert members == files[: sum(end <= cut for end in ends)]
        assert set(kinds(damage)) <= {"truncated", "no_end_marker", "bad_header", "not_tar"}
        assert bool(damage) == (cut < marker_end)


def test_a_zeroed_header_is_damage_and_not_the_end():
    data = bytearray(make_tar(FILES))
    header = next(m.offset for m in scan_of(bytes(data)) if m.name == "002.bin") - BLOCK
    data[header : header + BLOCK] = bytes(BLOCK)
    members, damage = read(bytes(data))
    assert [name for name, _ in members] == ["000.bin", "001.bin", "003.bin", "004.bin"]
    assert kinds(damage) == ["bad_header"]


def test_long_zero_content_behind_a_damaged_header_is_skipped_in_linear_time():
    files = [("a.npy", bytes(4 << 20)), ("b.txt", b"b")]
    data = bytearray(make_tar(files))
    data[0] ^= 1
    members, damage = read(bytes(data))
    assert members == files[1:]
    assert damage[0].num_bytes == (4 << 20) + BLOCK


def test_concatenated_tars_are_reported():
    first, second = make_tar(FILES[:2]), make_tar(FILES[2:])
    members, damage = read(first + second)
    assert members == FILES[:2]  # where tarfile and webdataset stop, too
    assert kinds(damage) == ["data_after_end"]


@pytest.mark.parametrize("data", [b"", b"no tar at all" * 400, b"\x1f\x8b" + bytes(range(256)) * 9])
def test_something_else_is_no_tar(data):
    members, damage = read(data)
    assert members == []
    assert kinds(damage) == ["not_tar"]


def test_sparse_files_are_reported():
    data = bytearray(make_tar([("a.txt", b"abc"), ("b.txt", b"b")]))
    data[156:157] = b"S"
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:BLOCK])
    members, damage = read(bytes(data))
    assert members == [("b.txt", b"b")]
    assert kinds(damage) == ["sparse"]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), min_size=1, max_size=12))
def test_any_damage_is_survived_and_no_content_is_invented(flips):
    data = make_tar(FILES)
    damaged = bytearray(data)
    for place, bits in flips:
        damaged[place % len(data)] ^= bits
    scan = scan_of(bytes(damaged))
    offsets = {member.name: (member.offset, member.num_bytes) for member in scan_of(data)}
    for member in scan:
        # Two flips may cancel in the checksum; then a name or a size can be wrong, no more.
        assert 0 <= member.offset <= len(data)
        assert member.offset + member.num_bytes <= len(data)
        if len(flips) == 1:
            assert offsets[member.name] == (member.offset, member.num_bytes)


def webdataset_samples(data: bytes):
    """[(key, {suffix: content})] as webdataset reads an intact shard."""
    opened = [{"url": "a.tar", "stream": io.BytesIO(data)}]
    samples = tariterators.group_by_keys(tariterators.tar_file_expander(opened))
    return [(s["__key__"], {k: v for k, v in s.items() if not k.startswith("__")}) for s in samples]


def is_left_alone(file: tuple[str, bytes]) -> bool:
    """Whether webdataset sees in a name what we see: a base name that begins with a dot it
    makes a sample of its folder.
    """
    return not file[0].rpartition("/")[2].startswith(".")


def our_samples(data: bytes):
    return [
        (sample.key, {suffix: data[o : o + n] for suffix, (o, n) in sample.members.items()})
        for sample in group_samples(scan_of(data))
    ]


names = st.text("aB./_1", min_size=1, max_size=12).filter(
    lambda name: not name.endswith("/") and not name.startswith("/") and "__" not in name
)


@settings(max_examples=150, deadline=None)
@given(st.lists(names, max_size=12), st.booleans())
def test_grouping_is_webdatasets(names, with_meta):
    files = [(name, f"{number}".encode()) for number, name in enumerate(names)]
    if with_meta:
        files.insert(len(files) // 2, ("__meta__", b"{}"))
        files.append(("__index__/a.txt", b"x"))
    data = make_tar(files)
    scan = scan_of(data)
    ours = our_samples(data)
    list(group_samples(scan))
    if "duplicate_member" in kinds(scan.damage):
        return  # webdataset raises on these
    assert ours == webdataset_samples(make_tar(filter(is_left_alone, files)))


@pytest.mark.parametrize("dialect", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_webdataset_reads_the_same_long_names(dialect):
    files = [(LONG + f"{i}.{suffix}", b"x") for i in range(3) for suffix in ("jpg", "JSON", "a.b")]
    data = make_tar(files, dialect)
    assert our_samples(data) == webdataset_samples(data)
    assert len(our_samples(data)) == 3


def test_a_duplicate_suffix_is_reported_and_the_first_one_counts():
    data = make_tar([("a.txt", b"1"), ("a.TXT", b"2"), ("b.txt", b"3")])
    scan = scan_of(data)
    samples = list(group_samples(scan))
    assert [sample.key for sample in samples] == ["a", "b"]
    assert data[slice(samples[0].members["txt"][0], samples[0].members["txt"][0] + 1)] == b"1"
    assert kinds(scan.damage) == ["duplicate_member"]


def test_names_that_are_not_utf8_are_reported():
    data = bytearray(make_tar([("a_.txt", b"1")]))
    data[1] = 0xFF
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:BLOCK])
    members, damage = read(bytes(data))
    assert members == [("a\\xff.txt", b"1")]
    assert kinds(damage) == ["name"]
