"""Reads the offline files of a W&B run, for which wandb has no Python reader.

A piece is a .wandb file: a header of 7 bytes, then W&B's records in LevelDB's log format
(https://github.com/google/leveldb/blob/main/doc/log_format.md; plain CRC-32 as the checksum).
"""

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

HEADER_BYTES = 7  # of the file, and of each part of a record: checksum, length, kind
BLOCK_BYTES = 32768
WHOLE, LAST = 1, 4  # kinds of parts; 2 and 3 are a record's first and middle ones
_Record: Any = getattr(wandb_internal_pb2, "Record")  # noqa: B009 - made at run time, untyped


def written_steps(directory: Path) -> set[int]:
    """Return the steps that the offline pieces of a run hold together."""
    steps: set[int] = set()
    for path in sorted(directory.glob("offline-run-*/*.wandb")):
        begun = False
        for record in read_piece(path):
            if record.HasField("run") and not begun:
                begun = True
                keep = record.run.branch_point.value if record.run.HasField("branch_point") else -1
                steps = {step for step in steps if step <= keep}
            elif record.HasField("history"):
                steps.add(record.history.step.num)
    return steps


def read_piece(path: Path) -> Iterator[Any]:
    """Yield the complete records of a .wandb file, in the order of writing."""
    data = path.read_bytes()
    at, parts = HEADER_BYTES, b""
    while at + HEADER_BYTES <= len(data):
        left = BLOCK_BYTES - at % BLOCK_BYTES  # in this block; less than a header is padding
        if left < HEADER_BYTES:
            at += left
            continue
        checksum, length, kind = struct.unpack_from("<IHB", data, at)
        part = data[at + HEADER_BYTES : at + HEADER_BYTES + length]
        if zlib.crc32(part, zlib.crc32(bytes([kind]))) != checksum:
            return  # incomplete after a kill
        at, parts = at + HEADER_BYTES + length, parts + part
        if kind in (WHOLE, LAST):
            yield _Record.FromString(parts)
            parts = b""
