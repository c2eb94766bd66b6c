"""Shards of every kind of name and dialect, and what can happen to them: seeded, one at a time.

`EXACT` damages bytes as disks and networks do. `SHIFTED` loses or gains blocks. `FORGED` changes
what a tar says and keeps its header checksums right, as an attacker or a broken program would.
"""

import io
import pickle
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.data.index.tar import group_samples
from pipeline.data.index.tar_header import BLOCK
from pipeline.data.index.tar_scan import TarScan
from tests.shards import png

DIALECTS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
NUM_SAMPLES = 9
SIZE_FIELD, CHECKSUM_FIELD, TYPE_FIELD = slice(124, 136), slice(148, 156), 156
WILD_SIZES = (
    b"77777777777\0",  # 8 GiB - 1
    b"\x80" + (2**62).to_bytes(11, "big"),
    b"\x80" + b"\xff" * 11,
    b"\xff" * 12,  # -1
    b"\x80" + (2**31).to_bytes(11, "big"),
    b"00000000000\0",
    b"9999999999 \0",
    b"-0000000001\0",
)

Rng = np.random.Generator
Data = bytearray


class Boom:
    """Whoever unpickles it leaves a file behind."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self._marker), "w")


@dataclass(frozen=True)
class Part:
    """A file in the tar: where its first extension header, its header and its content start."""

    key: str
    suffix: str
    start: int
    header: int
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class Shard:
    """A healthy shard, and where everything lies in it."""

    data: bytes
    parts: list[Part]

    @property
    def headers(self) -> list[int]:
        """The offsets of all header blocks, those of extensions, too."""
        return [
            block
            for part in self.parts
            for block in range(part.start, part.offset, BLOCK)
            if self.data[block + 257 : block + 262] == b"ustar"
        ]

    def samples(self) -> dict[str, dict[str, bytes]]:
        """Key -> suffix -> content."""
        found: dict[str, dict[str, bytes]] = {}
        for part in self.parts:
            content = self.data[part.offset : part.offset + part.num_bytes]
            found.setdefault(part.key, {})[part.suffix] = content
        return found


def key_of(number: int, rng: Rng, dialect: int) -> str:
    long = (
        f"{'d' * 70}/{'e' * 70}/{number:03d}" if dialect else f"{'d' * 90}/{'e' * 50}{number:03d}"
    )
    exact = f"{number:03d}".ljust(96 if dialect else 93, "n")  # `.png` or `.pickle`: 100 bytes
    return str(
        rng.choice(
            [f"{number:03d}", f"a/b-{number:03d}", f"ü/日本{number}", f"../{number}", long, exact]
        )
    )


def new_shard(seed: int, marker: Path) -> Shard:
    """A shard of nine samples: noise as PNG, class, JSON, and sometimes what must not be run."""
    rng = np.random.default_rng(seed)
    dialect = DIALECTS[seed % 3]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=dialect) as tar:
        for number in range(NUM_SAMPLES):
            side = int(rng.integers(2, 30))
            members = {"png": png(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))}
            members |= {"cls": b"%d" % number, "json": b'{"n": %d}' % number}
            for suffix in rng.choice(["pickle", "pkl", "pyd", "npy"], 2, replace=False):
                members[str(suffix)] = dangerous(str(suffix), marker)
            key = key_of(number, rng, dialect)
            for suffix in rng.permutation(list(members)).tolist():
                content = members[suffix]
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size, info.mtime = len(content), 1.5 if dialect == tarfile.PAX_FORMAT else 1
                tar.addfile(info, io.BytesIO(content))
    data = buffer.getvalue()
    parts: list[Part] = []
    scan = TarScan(lambda offset, size: data[offset : offset + size], len(data))
    start = 0
    for sample in group_samples(scan):
        for suffix, (offset, size) in sample.members.items():
            parts.append(Part(sample.key, suffix, start, offset - BLOCK, offset, size))
            start = offset + -(-size // BLOCK) * BLOCK
    assert scan.damage == []
    return Shard(data, parts)


def dangerous(suffix: str, marker: Path) -> bytes:
    if suffix == "pyd":
        return f"open({str(marker)!r}, 'w')\n".encode()
    if suffix == "npy":
        file = io.BytesIO()
        np.save(file, np.array([Boom(marker)], object), allow_pickle=True)
        return file.getvalue()
    return pickle.dumps(Boom(marker))


def seal(data: Data, header: int) -> None:
    """Make a changed header's checksum right."""
    data[header + 148 : header + 156] = b" " * 8
    data[header + 148 : header + 156] = b"%06o\0 " % sum(data[header : header + BLOCK])


def pick(rng: Rng, values: list[int]) -> int:
    return values[int(rng.integers(len(values)))]


def flip_header_byte(shard: Shard, data: Data, rng: Rng) -> None:
    data[pick(rng, shard.headers) + int(rng.integers(BLOCK))] ^= int(rng.integers(1, 256))


def flip_any_bytes(shard: Shard, data: Data, rng: Rng) -> None:
    for _ in range(int(rng.integers(1, 20))):
        data[int(rng.integers(len(data)))] ^= int(rng.integers(1, 256))


def flip_padding(shard: Shard, data: Data, rng: Rng) -> None:
    part = shard.parts[int(rng.integers(len(shard.parts)))]
    stop = part.offset + -(-part.num_bytes // BLOCK) * BLOCK
    for place in range(part.offset + part.num_bytes, stop):
        data[place] = int(rng.integers(256))


def zero_header(shard: Shard, data: Data, rng: Rng) -> None:
    header = pick(rng, shard.headers)
    data[header : header + BLOCK] = bytes(BLOCK)


def overwrite_blocks(shard: Shard, data: Data, rng: Rng) -> None:
    start = int(rng.integers(len(data) // BLOCK)) * BLOCK
    stop = min(start + int(rng.integers(1, 9)) * BLOCK, len(data))
    data[start:stop] = rng.bytes(stop - start)


def truncate(shard: Shard, data: Data, rng: Rng) -> None:
    del data[int(rng.integers(len(data))) :]


def wild_size(shard: Shard, data: Data, rng: Rng) -> None:
    header = pick(rng, shard.headers)
    data[header + 124 : header + 136] = WILD_SIZES[int(rng.integers(len(WILD_SIZES)))]
    seal(data, header)


def drop_blocks(shard: Shard, data: Data, rng: Rng) -> None:
    start = int(rng.integers(len(data) // BLOCK)) * BLOCK
    del data[start : start + int(rng.integers(1, 9)) * BLOCK]


def insert_blocks(shard: Shard, data: Data, rng: Rng) -> None:
    start = int(rng.integers(len(data) // BLOCK)) * BLOCK
    size = int(rng.integers(1, 9)) * BLOCK
    data[start:start] = rng.bytes(size) if rng.integers(2) else bytes(size)


def lying_size(shard: Shard, data: Data, rng: Rng) -> None:
    header = pick(rng, shard.headers)
    data[header + 124 : header + 136] = b"%011o\0" % int(rng.integers(0, 40 * BLOCK))
    seal(data, header)


def hostile_name(shard: Shard, data: Data, rng: Rng) -> None:
    names = (
        b"../../../etc/passwd.png",
        b"/etc/passwd.png",
        b"a\\..\\b.png",
        b"|rm -rf.png",
        b".png",
    )
    header = shard.parts[int(rng.integers(len(shard.parts)))].header
    data[header : header + 100] = names[int(rng.integers(len(names)))].ljust(100, b"\0")
    seal(data, header)


def other_type(shard: Shard, data: Data, rng: Rng) -> None:
    header = pick(rng, shard.headers)
    data[header + TYPE_FIELD] = b"1256379AZS\0"[int(rng.integers(11))]
    seal(data, header)


def drop_member(shard: Shard, data: Data, rng: Rng) -> None:
    part = shard.parts[int(rng.integers(len(shard.parts)))]
    del data[part.start : part.offset + -(-part.num_bytes // BLOCK) * BLOCK]


def repeat_member(shard: Shard, data: Data, rng: Rng) -> None:
    part = shard.parts[int(rng.integers(len(shard.parts)))]
    stop = part.offset + -(-part.num_bytes // BLOCK) * BLOCK
    at = shard.parts[int(rng.integers(len(shard.parts)))].start
    data[at:at] = data[part.start : stop]


def lying_pax(shard: Shard, data: Data, rng: Rng) -> None:
    """A PAX header before some member whose record does not have the length it claims."""
    claimed = int(rng.choice([1, 5, 13, 99, 511, 10**9, 10**19]))
    records = b"%d path=../x.png\n20 mtime=%s\n" % (claimed, b"1" * 10)
    header = Data(shard.data[shard.parts[0].header : shard.parts[0].offset])
    header[TYPE_FIELD] = ord("x")
    header[SIZE_FIELD] = b"%011o\0" % len(records)
    seal(header, 0)
    at = shard.parts[int(rng.integers(len(shard.parts)))].start
    data[at:at] = header + records.ljust(BLOCK, b"\0")


def other_file(shard: Shard, data: Data, rng: Rng) -> None:
    content = (b"", zlib.compress(shard.data), rng.bytes(5000), rng.bytes(7), b"<html>" * 300)
    data[:] = content[int(rng.integers(len(content)))]


Mutate = Callable[[Shard, Data, Rng], None]
EXACT: tuple[Mutate, ...] = (
    flip_header_byte,
    flip_any_bytes,
    flip_padding,
    zero_header,
    overwrite_blocks,
    truncate,
    wild_size,
    other_file,
)
SHIFTED: tuple[Mutate, ...] = (drop_blocks, insert_blocks)
FORGED: tuple[Mutate, ...] = (
    lying_size,
    hostile_name,
    other_type,
    drop_member,
    repeat_member,
    lying_pax,
)
