"""JPEG: strictly decoded pixels, upright, whatever stands in the header.

    bytes -> segments up to the first scan -> orientation
          -> strict decoding -> if it fails: again with a header reduced to what the pixels need

libjpeg has one kind of warning for lost pixels (a premature end, a corrupt scan) and for a header
that is merely odd, and strict decoding fails at any. A reduced header gives no cause for the
latter, so what is left is damage.
"""

import math
import re
import struct
from collections.abc import Callable, Iterator

import simplejpeg

from pipeline.data.decode.fault import Content, DecodeError
from pipeline.data.decode.libraries import PixelRules, check_size, read_with_pillow
from pipeline.data.decode.orientation import TURNED, orientation_in, upright
from pipeline.data.decode.pixels import Pixels

# (height, width) of the upright image in its file -> the smallest scale that is still enough.
ScaleOf = Callable[[int, int], float]

JPEG_MAGIC = b"\xff\xd8\xff"
COLOURS = {1: "GRAY", 3: "RGB", 4: "RGBA"}  # simplejpeg's name of so many channels
EXIF_MARK = b"Exif\x00\x00"
XMP_MARK = b"http://ns.adobe.com/xap/1.0/\x00"

# Markers (ITU T.81, table B.1). Those of FRAMES give size and components, one each.
FRAMES = {0xC0 | kind for kind in range(16)} - {0xC4, 0xC8, 0xCC}
SEQUENTIAL = (0xC0, 0xC1, 0xC9)
SOI, EOI, SOS, APP0, APP1, APP14, APP15, COMMENT = 0xD8, 0xD9, 0xDA, 0xE0, 0xE1, 0xEE, 0xEF, 0xFE
ALONE = {0x01, *range(0xD0, 0xD8)}  # they have no length
# JFIF, tables of 64 quantisation steps, a baseline frame of 1 or 3 components, the usual Huffman
# tables: what most encoders write. Each length is that of its segment, so nothing else can hide.
_USUAL_HEADER = re.compile(
    rb"\xff\xd8\xff\xe0\x00\x10.{14}(?:\xff\xdb\x00\x43.{65}){1,2}+"
    rb"\xff\xc0\x00(?:\x0b.{9}|\x11.{15})(?:\xff\xc4\x00(?:\x1f.{29}|\xb5.{179}))*+",
    re.DOTALL,
)
_PLAIN = {0xFF00 | kind for kind in {*range(0xC0, 0xFF)} - {*ALONE, SOI, EOI, SOS, APP1}}
_segment_start = struct.Struct(">HH").unpack_from  # marker and length
# Only the last of the fill bytes \xff before a marker is matched: else a file that ends in many of
# them, as one from a damaged card, takes quadratic time.
_MARKER = re.compile(rb"\xff([\x01-\xfe])")
_SCAN_END = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")  # any marker but those of restarts
# How components become colours, by their number: what Adobe's segment may say, the usual one last.
TRANSFORMS = {3: (0, 1), 4: (0, 2)}
UNKNOWN_SUBSAMPLING = "subsampling"  # in the message of TurboJPEG, which knows the usual ones only


def full_scale(height: int, width: int) -> float:  # noqa: ARG001
    """Scale 1: every pixel of the file."""
    return 1.0


def may_be_turned(data: Content) -> bool:
    """Tell whether a JPEG holds a segment for metadata before its scan, or must be looked through.

    Every file passes here. So this is quick, and leaves all that is odd to `_segments`.
    """
    usual = _USUAL_HEADER.match(data)
    place = usual.end() if usual else 2
    try:
        marker, length = _segment_start(data, place)
        while marker in _PLAIN:
            place += length + 2
            marker, length = _segment_start(data, place)
    except struct.error:  # the file ends
        return True
    return marker != 0xFF00 | SOS


def is_grey(data: Content) -> bool:
    """Tell whether a JPEG has one component."""
    return _frame(data)[1][5:6] == b"\x01"


def read_jpeg(data: Content, rules: PixelRules, scale_of: ScaleOf) -> Pixels:
    """Decode a JPEG, upright, scaled down while it is decoded, but not below `scale_of`."""
    orientation = _orientation(data) if may_be_turned(data) else 1
    is_turned = orientation in TURNED
    try:
        pixels = _decoded(data, rules, scale_of, is_turned)
    except ValueError:
        try:
            pixels = _decoded(reduced(data), rules, scale_of, is_turned)
        except ValueError as error:
            if UNKNOWN_SUBSAMPLING in str(error) and _frame(data)[0]:
                return read_with_pillow(data, rules)
            raise DecodeError("decode", f"JPEG: {error}") from None
    return upright(pixels, orientation)


def _decoded(data: Content, rules: PixelRules, scale_of: ScaleOf, is_turned: bool) -> Pixels:
    height, width = (int(side) for side in simplejpeg.decode_jpeg_header(data)[:2])
    if not rules.counts_scaled or _holds_coefficients(data):
        check_size(height, width, rules)
    scale = scale_of(width, height) if is_turned else scale_of(height, width)
    # Minus 1e-6: rounding errors must not push a whole number up to the next one.
    least = (math.ceil(height * scale - 1e-6), math.ceil(width * scale - 1e-6))
    if rules.counts_scaled:
        height, width = (int(side) for side in simplejpeg.decode_jpeg_header(data, *least)[:2])
        check_size(height, width, rules)
    colours = COLOURS[rules.channels]
    return simplejpeg.decode_jpeg(data, colours, min_height=least[0], min_width=least[1])


def _segments(data: Content, place: int) -> Iterator[tuple[int, Content, int]]:
    """Yield marker, content and end of each segment from `place` to the next start of a scan.

    As in libjpeg: bytes before a marker are passed over, and a length is believed. Ends where the
    image or the file does.
    """
    while found := _MARKER.search(data, place):
        marker, place = found[1][0], found.end()
        if marker in ALONE:
            continue
        end = place + max(2, int.from_bytes(data[place : place + 2], "big"))
        if marker in (SOI, EOI) or end > len(data):
            return
        yield marker, data[place + 2 : end], end
        if marker == SOS:
            return
        place = end


def _orientation(data: Content) -> int:
    """The orientation in the segments before the first scan, as Pillow takes it from them."""
    found: dict[str, bytes | str] = {}
    exif: list[Content] = []
    for marker, content, _ in _segments(data, 2):
        if marker == APP1 and content.startswith(EXIF_MARK):
            # A long block goes on in further segments.
            exif.append(content.removeprefix(EXIF_MARK) if exif else content)
        elif marker == APP1 and content.startswith(XMP_MARK):
            found["xmp"] = bytes(content.removeprefix(XMP_MARK))
    if exif:
        found["exif"] = b"".join(exif)
    return orientation_in(found)


def _frame(data: Content) -> tuple[int, Content]:
    """Marker and content of the frame header; 0 and no bytes if there is none."""
    found = ((marker, content) for marker, content, _ in _segments(data, 2) if marker in FRAMES)
    return next(found, (0, b""))


def _holds_coefficients(data: Content) -> bool:
    """Tell whether decoding takes memory for the whole image, however small it becomes.

    So it is where the image comes in several scans.
    """
    frame, components = _frame(data)
    scan = [content for marker, content, _ in _segments(data, 2) if marker == SOS]
    return frame not in SEQUENTIAL or any(content[:1] != components[5:6] for content in scan)


def reduced(data: Content) -> bytes:
    """Return a JPEG of the same pixels with a plain header.

    Without comments, applications' segments and stray bytes between segments, and with the usual
    values where no decoder uses those that are there. Scans stay as they are, but for zeros behind
    their end.
    """
    parts, place = [data[:2]], 2
    frame, components = _frame(data)
    num_components = components[5] if len(components) > 5 else 0
    while True:
        marker = 0
        for marker, content, end in _segments(data, place):
            place = end
            needed = _needed(marker, content, frame in SEQUENTIAL, num_components)
            if needed is not None:
                length = len(needed) + 2
                parts.append(bytes((0xFF, marker)) + length.to_bytes(2, "big") + needed)
        scan_end = _SCAN_END.search(data, place) if marker == SOS else None
        if scan_end is None:
            return b"".join([*parts, data[place:]])
        scan = data[place : scan_end.start()].rstrip(b"\xff")  # fill bytes
        parts.append(scan[: len(scan.rstrip(b"\0")) + 1])
        place = scan_end.start()


def _needed(
    marker: int, content: Content, is_sequential: bool, num_components: int
) -> Content | None:
    """What `reduced` keeps of a segment."""
    if marker == APP0 and content.startswith(b"JFIF\0") and len(content) >= 14:
        return b"JFIF\0\x01\x01" + content[7:12] + b"\0\0"  # version 1.01, no thumbnail
    if marker == APP14 and content.startswith(b"Adobe") and len(content) >= 12:
        known = TRANSFORMS.get(num_components, (content[11],))
        transform = content[11] if content[11] in known else known[-1]
        return content[:11] + bytes((transform,))
    if APP0 <= marker <= APP15 or marker == COMMENT:
        return None
    if marker == SOS and is_sequential:
        return content[:-3] + b"\0\x3f\0"  # all coefficients at once: there is no other way
    return content
