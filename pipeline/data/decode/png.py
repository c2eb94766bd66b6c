"""PNG: chunks are checked before a library sees any, and only those of the pixels are handed on.

    bytes -> size bound -> chunks, their checksums -> orientation
                        -> a PNG of IHDR, PLTE, tRNS, IDAT -> OpenCV | Pillow -> pixels, upright

So damage is found alike whichever library decodes, and texts, profiles, animations and what stands
behind the image's end disturb none.
"""

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np

from pipeline.data.decode.fault import Content, DecodeError
from pipeline.data.decode.libraries import (
    PixelRules,
    check_size,
    opencv,
    pixels_of,
    read_with_opencv,
    read_with_pillow,
)
from pipeline.data.decode.orientation import orientation_in, upright
from pipeline.data.decode.pixels import Deep, Pixels, cleared

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
GREY, COLOUR, PALETTE, GREY_ALPHA, COLOUR_ALPHA = 0, 2, 3, 4, 6  # colour types
TRNS_BYTES = {GREY: 2, COLOUR: 6, PALETTE: 0}  # at least; other types have no tRNS
PLAIN = {1: GREY, 3: COLOUR, 4: COLOUR_ALPHA}  # what OpenCV gives as so many channels
# Chunks that no pixel depends on here: damaged or not, they are passed over.
UNUSED = {
    *(b"gAMA", b"cHRM", b"iCCP", b"sRGB", b"cICP", b"mDCV", b"cLLI", b"sBIT"),  # of colour
    *(b"acTL", b"fcTL", b"fdAT"),  # of animations, whose first frame is the plain image
    *(b"bKGD", b"hIST", b"pHYs", b"sPLT", b"tIME", b"oFFs", b"pCAL", b"sCAL", b"sTER", b"dSIG"),
}
TEXT = {b"tEXt", b"zTXt", b"iTXt"}
# The texts in which Pillow looks for an orientation.
KEYWORDS = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0")
MAX_TEXT = 1 << 20  # bytes of a compressed text that are looked at


@dataclass(frozen=True)
class PngFile:
    """A PNG whose chunks are whole."""

    bit_depth: int
    colour_type: int
    clear: bytes  # tRNS: which values are transparent; empty: none
    content: Content  # the file, reduced to what the pixels depend on
    orientation: int


def png_channels(data: Content) -> int:
    """The channels that keep all colours and alpha of a PNG."""
    file = _opened(data)
    if file.clear or file.colour_type in (GREY_ALPHA, COLOUR_ALPHA):
        return 4
    return 1 if file.colour_type == GREY else 3


def png_bit_depth(data: Content) -> int | None:
    """Bits of a value in a PNG file; None for other files."""
    return data[24] if data.startswith(PNG_MAGIC) and len(data) > 24 else None


def read_png(data: Content, rules: PixelRules) -> Pixels:
    """Decode a PNG, upright; raise DecodeError naming the chunk that is damaged."""
    if len(data) < 33 or data[12:16] != b"IHDR":
        raise DecodeError("decode", f"PNG: no header in {len(data)} bytes")
    width, height = struct.unpack_from(">II", data, 16)
    check_size(height, width, rules)
    file = _opened(data)
    if file.bit_depth == 16 and (rules.is_deep or (file.clear and file.colour_type == COLOUR)):
        pixels = pixels_of(_deep(file), rules)
    elif file.bit_depth == 8 and not file.clear and file.colour_type == PLAIN[rules.channels]:
        pixels = read_with_opencv(file.content, rules)
    else:
        pixels = read_with_pillow(file.content, rules)
    return upright(pixels, file.orientation)


def _deep(file: PngFile) -> Deep:
    """Both bytes of 16-bit values, [height, width, 1 | 3 | 4]."""
    pixels = opencv(file.content, cv2.IMREAD_UNCHANGED)
    if pixels is None:
        raise DecodeError("decode", "PNG: damaged or incomplete")
    pixels = pixels.astype(np.uint16, copy=False)
    if pixels.ndim == 3:
        return pixels
    grey = pixels[:, :, np.newaxis]  # OpenCV heeds tRNS in colour only
    return cleared(grey, int.from_bytes(file.clear[:2], "big")) if file.clear else grey


def _opened(data: Content) -> PngFile:
    """Check the chunks, and sort out what the pixels and the orientation depend on."""
    bit_depth, colour_type = data[24], data[25]
    view = memoryview(data)
    parts: list[Content | memoryview] = [view[:8]]
    clear = b""
    has_pixels = is_changed = False
    metadata: dict[str, bytes | str] = {}
    for name, start, end in _chunks(data):
        if name in UNUSED or (name in TEXT and not data.startswith(KEYWORDS, start + 8)):
            continue
        (checksum,) = struct.unpack_from(">I", data, end - 4)
        if zlib.crc32(view[start + 4 : end - 4]) != checksum:
            raise _damaged(name, "its checksum does not fit")
        if name in (b"IHDR", b"PLTE", b"IDAT"):
            parts.append(view[start:end])
            has_pixels = has_pixels or name == b"IDAT"
        elif name == b"tRNS" and not has_pixels and colour_type in TRNS_BYTES:
            clear = bytes(view[start + 8 : end - 4])
            parts.append(_transparency(clear, bit_depth, colour_type))
            is_changed = parts[-1] != view[start:end]
        elif name == b"eXIf":
            metadata["exif"] = b"Exif\0\0" + bytes(view[start + 8 : end - 4])
        elif name in TEXT:
            keyword, text = _text(name, bytes(view[start + 8 : end - 4]))
            metadata[keyword] = text
    parts.append(PNG_END)
    is_changed |= sum(map(len, parts)) != len(data) or not data.endswith(PNG_END)
    content = b"".join(parts) if is_changed else data
    return PngFile(bit_depth, colour_type, clear, content, orientation_in(metadata))


def _chunks(data: Content) -> Iterator[tuple[bytes, int, int]]:
    """Yield type, start and end of each chunk before IEND.

    A file may lack IEND, which holds nothing: no pixel is lost with it.
    """
    place = len(PNG_MAGIC)
    while place + 8 <= len(data):
        length, name = struct.unpack_from(">I4s", data, place)
        if name == b"IEND":
            return
        end = place + 12 + length
        if end > len(data):
            raise _damaged(name, "it ends behind the file")
        yield name, place, end
        place = end


def _transparency(clear: bytes, bit_depth: int, colour_type: int) -> bytes:
    """Return the chunk tRNS as Pillow expects it."""
    if len(clear) < TRNS_BYTES[colour_type]:
        raise _damaged(b"tRNS", f"it has {len(clear)} bytes")
    if colour_type == GREY and bit_depth in (2, 4):
        # Pillow compares with levels of 8 bits.
        clear = struct.pack(">H", int.from_bytes(clear[:2], "big") * 255 // (2**bit_depth - 1))
    body = b"tRNS" + clear
    return struct.pack(">I", len(clear)) + body + struct.pack(">I", zlib.crc32(body))


def _text(name: bytes, body: bytes) -> tuple[str, str]:
    """Return keyword and text of a chunk tEXt, zTXt or iTXt (PNG, section 11.3.3)."""
    keyword, _, text = body.partition(b"\0")
    is_packed = name == b"zTXt"
    if name == b"iTXt":
        is_packed = text[:1] == b"\1"
        text = text[2:].split(b"\0", 2)[-1]  # behind language and translated keyword
    elif is_packed:
        text = text[1:]
    if is_packed:
        try:
            text = zlib.decompressobj().decompress(text, MAX_TEXT)
        except zlib.error:
            text = b""
    return keyword.decode("latin-1"), text.decode("latin-1")


def _damaged(name: bytes, reason: str) -> DecodeError:
    return DecodeError("decode", f"PNG: chunk {name.decode('latin-1')!r} is damaged: {reason}")
