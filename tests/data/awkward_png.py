"""PNG files by a small writer of our own: all colour types and depths, whole and damaged.

drawn values -> the pixels that they show (PNG specification, third edition) -> chunks -> a file
"""

import struct
import zlib

import numpy as np
from numpy.typing import NDArray

from tests.data.image_truth import (
    UNLIKE_PILLOW,
    Bytes,
    Made,
    Random,
    exif,
    over_white,
    turned,
    xmp,
)

SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # of a pixel, by PNG's colour type
DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
USED_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"eXIf")


def chunk(name: bytes, body: bytes) -> bytes:
    """A chunk with its length and checksum."""
    checksum = struct.pack(">I", zlib.crc32(name + body))
    return struct.pack(">I", len(body)) + name + body + checksum


def packed(values: NDArray[np.int64], depth: int) -> bytes:
    """Rows of a PNG: [height, width, samples] in `depth` bits each, every row with filter 0."""
    height = values.shape[0]
    if depth == 16:
        rows = values.reshape(height, -1).astype(">u2").view(np.uint8)
    else:
        bits = values.reshape(height, -1, 1) >> np.arange(depth - 1, -1, -1) & 1
        rows = np.packbits(bits.reshape(height, -1).astype(np.uint8), axis=1)
    return np.insert(rows, 0, 0, axis=1).tobytes()


def adam7(values: NDArray[np.int64], depth: int) -> bytes:
    """The seven passes of an interlaced PNG."""
    passes = ((0, 8, 0, 8), (0, 8, 4, 8), (4, 8, 0, 4), (0, 4, 2, 4), (2, 4, 0, 2), (0, 2, 1, 2))
    parts = [values[a::b, c::d] for a, b, c, d in (*passes, (1, 2, 0, 1))]
    return b"".join(packed(part, depth) for part in parts if part.size)


def png_chunks(rng: Random) -> tuple[list[bytes], Bytes, str]:
    """Chunks of a PNG of a random kind, the pixels it shows, and what is special."""
    colour_type = int(rng.choice(list(SAMPLES)))
    depth = int(rng.choice(DEPTHS[colour_type]))
    height, width = (int(side) for side in rng.integers(1, 40, 2))
    values = rng.integers(0, 2**depth, (height, width, SAMPLES[colour_type]))
    levels = values >> 8 if depth == 16 else values * 255 // (2**depth - 1)
    words = f"colour type {colour_type}, {depth} bits"
    alpha = levels[:, :, -1] if colour_type in (4, 6) else np.full((height, width), 255)
    colour = levels[:, :, :3] if colour_type in (2, 6) else levels[:, :, :1].repeat(3, axis=2)
    extra: list[bytes] = []
    if colour_type == 3:
        palette = rng.integers(0, 256, (2**depth, 3))
        colour = palette[values[:, :, 0]]
        extra.append(chunk(b"PLTE", palette.astype(np.uint8).tobytes()))
    if colour_type in (0, 2, 3) and rng.random() < 0.5:
        words += ", tRNS"
        if colour_type == 3:
            table = rng.integers(0, 256, 2**depth)
            alpha = table[values[:, :, 0]]
            extra.append(chunk(b"tRNS", table.astype(np.uint8).tobytes()))
        else:
            key = values[rng.integers(height), rng.integers(width)]
            alpha = np.where((values == key).all(axis=2), 0, 255)
            extra.append(chunk(b"tRNS", key.astype(">u2").tobytes()))
            if depth in (2, 4, 16):
                words += f" ({UNLIKE_PILLOW})"
    is_laced = bool(rng.random() < 0.3)
    data = zlib.compress((adam7 if is_laced else packed)(values, depth))
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, is_laced)
    num_parts = int(rng.integers(1, 4))
    # The last part holds more than the stream's checksum, without which no pixel is lost.
    part = -(-len(data) // num_parts) if len(data) >= 8 * num_parts else len(data)
    pixels = [chunk(b"IDAT", data[at : at + part]) for at in range(0, len(data), part)]
    chunks = [chunk(b"IHDR", header), *extra, *pixels, chunk(b"IEND", b"")]
    if depth == 16 and colour_type == 0:
        words += f" ({UNLIKE_PILLOW})"
    return chunks, over_white(colour, alpha), words + (", interlaced" if is_laced else "")


def png_file(chunks: list[bytes]) -> bytes:
    """The file of some chunks."""
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def name_of(piece: bytes) -> bytes:
    """A chunk's type."""
    return piece[4:8]


def png_plain(rng: Random) -> Made:
    chunks, shown, words = png_chunks(rng)
    return png_file(chunks), shown, words


def png_turned(rng: Random) -> Made:
    chunks, shown, words = png_chunks(rng)
    orientation = int(rng.integers(1, 9))
    block, packet = exif(orientation, rng.choice(["<", ">"])), xmp(orientation)
    other = xmp(orientation % 8 + 1)
    key = b"XML:com.adobe.xmp\0"
    metadata, where = [
        ([chunk(b"eXIf", block)], "eXIf"),
        ([chunk(b"iTXt", key + b"\0\0\0\0" + packet)], "iTXt"),
        ([chunk(b"iTXt", key + b"\1\0\0\0" + zlib.compress(packet))], "compressed iTXt"),
        ([chunk(b"eXIf", block), chunk(b"iTXt", key + b"\0\0\0\0" + other)], "eXIf before XMP"),
        (
            [chunk(b"eXIf", exif(0)), chunk(b"iTXt", key + b"\0\0\0\0" + packet)],
            "XMP, Exif of none",
        ),
        ([chunk(b"zTXt", b"Raw profile type exif\0\0" + profile(block))], "raw profile"),
    ][rng.integers(6)]
    at = -1 if rng.random() < 0.5 else 1
    chunks[at:at] = metadata
    return png_file(chunks), turned(shown, orientation), f"{words}, turned by {where} at {at}"


def profile(block: bytes) -> bytes:
    return zlib.compress(b"\nexif\n%8d\n%s\n" % (len(block), block.hex().encode()))


def png_unused_chunks(rng: Random) -> Made:
    chunks, shown, words = png_chunks(rng)
    bomb = b"a\0\0" + zlib.compress(bytes(2 << 20))
    unused = [(b"tEXt", b"a\0b"), (b"zTXt", bomb), (b"iTXt", b"a\0\1\0\0\0" + bomb[3:])]
    unused += [(b"gAMA", b"\0\0\x30\0"), (b"iCCP", b"no profile"), (b"tIME", bytes(7))]
    unused += [(b"acTL", bytes(8)), (b"fcTL", b"\0" * 3), (b"prVt", b"private")]
    name, body = unused[rng.integers(len(unused))]
    piece = chunk(name, body)
    if is_damaged := bool(rng.random() < 0.5) and name != b"prVt":
        piece = piece[:-1] + bytes((piece[-1] ^ 1,))
    chunks.insert(-1 if rng.random() < 0.5 else 1, piece)
    return png_file(chunks), shown, f"{words}, {name.decode()} {'damaged' if is_damaged else ''}"


def png_damaged_chunk(rng: Random) -> Made:
    chunks, _, words = png_chunks(rng)
    chunks.insert(1, chunk(b"eXIf", exif(6)))
    at = int(rng.choice([i for i, it in enumerate(chunks) if name_of(it) in USED_CHUNKS]))
    piece = bytearray(chunks[at])
    piece[rng.integers(4, len(piece))] ^= 1 << int(rng.integers(8))
    name = name_of(chunks[at]).decode()
    chunks[at] = bytes(piece)
    return png_file(chunks), None, f"{words}, a bit of {name} flipped"


def png_lying_length(rng: Random) -> Made:
    """A chunk's length that is not its own."""
    chunks, _, words = png_chunks(rng)
    at = int(rng.integers(len(chunks) - 1))
    length = int.from_bytes(chunks[at][:4], "big")
    false = int(rng.choice([length + 1, length + 12, max(0, length - 1) if length else 5, 1 << 31]))
    chunks[at] = false.to_bytes(4, "big") + chunks[at][4:]
    return png_file(chunks), None, f"{words}, length of {name_of(chunks[at]).decode()} is {false}"


def png_end(rng: Random) -> Made:
    """IEND missing, cut or damaged, or more bytes behind it: no pixel is lost."""
    chunks, shown, words = png_chunks(rng)
    end = [b"", chunks[-1][: rng.integers(12)], chunks[-1][:-1] + b"?", chunks[-1] + bytes(40)]
    chunks[-1] = end[rng.integers(4)]
    return png_file(chunks), shown, f"{words}, ends in {chunks[-1][:16]!r}"


def png_cut(rng: Random) -> Made:
    """Cut within one of the chunks before IEND."""
    chunks, _, words = png_chunks(rng)
    at = int(rng.integers(len(chunks) - 1))
    chunks[at] = chunks[at][: rng.integers(8, len(chunks[at]))]
    name = name_of(chunks[at]).decode()
    return png_file(chunks[: at + 1]), None, f"{words}, cut within {name} ({UNLIKE_PILLOW})"


PNG_KINDS = (
    png_plain,
    png_turned,
    png_unused_chunks,
    png_damaged_chunk,
    png_lying_length,
    png_end,
    png_cut,
)
