"""JPEG files whose header was operated upon, and files with lost data.

pixels -> a plain JPEG -> Pillow's reading of it, the truth -> segments added, changed, damaged
"""

import base64
import struct

import numpy as np
import simplejpeg

from tests.data.image_truth import (
    UNLIKE_PILLOW,
    Bytes,
    Made,
    Random,
    by_pillow,
    exif,
    saved,
    smooth,
    turned,
    xmp,
)

EXIF_MARK = b"Exif\0\0"
XMP_MARK = b"http://ns.adobe.com/xap/1.0/\0"
# Coded by an arithmetic coder, which no library of ours can: 24 x 16 pixels, by libjpeg.
ARITHMETIC = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAA0JCgsKCA0LCgsODg0PEyAVExISEyccHhcgLikxMC4pLSwzOko+MzZG"
    "NywtQFdBRkxOUlNSMj5aYVpQYEpRUk//2wBDAQ4ODhMREyYVFSZPNS01T09PT09PT09PT09PT09PT09PT09PT09P"
    "T09PT09PT09PT09PT09PT09PT09PT09PT0//yQARCAAQABgDASIAAhEBAxEB/8wACgAQEAUBEBEF/9oADAMBAAIR"
    "AxEAPwD/AHhvO0miwwQd8i+cTT0y0hOS04/BswRuJ+D5hVN6gNgP6ld+DRtF88srDP/Z"
)
# 24 x 16 pixels whose components are sampled 2x2, 2x1 and 1x2, by libjpeg.
ODD_SAMPLING = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAA0JCgsKCA0LCgsODg0PEyAVExISEyccHhcgLikxMC4pLSwzOko+MzZG"
    "NywtQFdBRkxOUlNSMj5aYVpQYEpRUk//2wBDAQ4ODhMREyYVFSZPNS01T09PT09PT09PT09PT09PT09PT09PT09P"
    "T09PT09PT09PT09PT09PT09PT09PT09PT0//wAARCAAQABgDASIAAiEBAxIB/8QAFgABAQEAAAAAAAAAAAAAAAAA"
    "BQAG/8QAGxAAAgEFAAAAAAAAAAAAAAAAAAUDBCEyYWL/xAAZAQACAwEAAAAAAAAAAAAAAAACBQABBAf/xAAZEQAC"
    "AwEAAAAAAAAAAAAAAAAABAIDImH/2gAMAwEAAhEDEQA/AMnCv0IUy++I3Cv5EKZffE2Sd6VU7oJNgRpsAsK/kjWQ"
    "r9EHJ3pDoNLGRHSxk//Z"
)


def segment(marker: int, body: bytes) -> bytes:
    """A segment with its length."""
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


def segments(content: bytes) -> tuple[list[bytes], bytes]:
    """Return the segments of a plain JPEG before its scan, and the scan with what follows."""
    place, found = 2, []
    while content[place + 1] != 0xDA:
        end = place + 2 + int.from_bytes(content[place + 2 : place + 4], "big")
        found.append(content[place:end])
        place = end
    return found, content[place:]


def plain(rng: Random) -> tuple[bytes, Bytes, str]:
    """A JPEG of a random kind that no one objects to."""
    kind = int(rng.integers(8))
    pixels = smooth(rng, 1 if kind == 0 else 3)
    if kind in (1, 2):
        sampling = ("440", "411")[kind - 1]
        content = simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), 90, "RGB", sampling)
    elif kind == 3:
        content = saved(pixels, "JPEG", as_mode="CMYK")
    else:
        options = [{}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_blocks": 2}]
        content = saved(pixels, "JPEG", quality=int(rng.integers(50, 96)), **options[kind % 4])
    return content, by_pillow(content), f"kind {kind}"


def jpeg_plain(rng: Random) -> Made:
    content, shown, words = plain(rng)
    if rng.random() < 0.3:
        content = (ARITHMETIC, ODD_SAMPLING)[rng.integers(2)]
        shown, words = by_pillow(content), "arithmetic coding, or odd sampling"
    return content, shown, words


def jpeg_turned(rng: Random) -> Made:
    """Orientation in Exif or XMP, wherever the segments stand."""
    content, shown, words = plain(rng)
    head, scan = segments(content)
    orientation = int(rng.integers(1, 9))
    block = exif(orientation, rng.choice(["<", ">"]))
    # A thumbnail is a JPEG of its own within the block.
    long_block = block + content if rng.random() < 0.5 else block
    packet = segment(0xE1, XMP_MARK + xmp(orientation, bool(rng.random() < 0.5)))
    other = segment(0xE1, XMP_MARK + b" " * 300 + xmp(orientation % 8 + 1))
    extra, where = [
        ([segment(0xE1, EXIF_MARK + long_block)], "Exif"),
        ([packet], "XMP"),
        ([other, segment(0xE1, EXIF_MARK + block)], "Exif behind XMP"),
        ([segment(0xE1, EXIF_MARK + block), other], "Exif before XMP"),
        ([packet, segment(0xE1, EXIF_MARK + exif(0))], "XMP beside Exif without orientation"),
        ([*profile(rng), segment(0xE1, EXIF_MARK + block)], "Exif behind a profile"),
    ][rng.integers(6)]
    at = int(rng.integers(len(head) + 1))
    head[at:at] = extra
    content = b"\xff\xd8" + b"".join(head) + scan
    return content, turned(shown, orientation), f"{words}, orientation {orientation}: {where}, {at}"


def profile(rng: Random) -> list[bytes]:
    """A colour profile in three segments that hold whatever bytes, markers among them."""
    parts = [rng.integers(0, 256, 700).astype(np.uint8).tobytes() + b"\xff\xda\xff\xe1"] * 3
    numbered = enumerate(parts, start=1)
    return [segment(0xE2, b"ICC_PROFILE\0" + bytes((i, 3)) + part) for i, part in numbered]


def jpeg_odd_header(rng: Random) -> Made:
    """Headers that libjpeg warns about, though no pixel is lost; one or two oddities at a time."""
    content, shown, words = plain(rng)
    head, scan = segments(content)
    done = []
    for oddity in rng.permutation(11)[: rng.integers(1, 3)]:
        at = int(rng.integers(1, len(head) + 1))
        done.append(f"{oddity} at {at}")
        if oddity == 0 and b"\xff\xc2" not in [it[:2] for it in head]:  # Se = 0
            scan = scan[: scan[3]] + b"\0" + scan[scan[3] + 1 :]
        elif oddity == 1:
            head.insert(at, b"\xff" * int(rng.integers(1, 9)))
        elif oddity == 2:
            head.insert(
                at, rng.integers(0, 255, int(rng.integers(1, 9))).astype(np.uint8).tobytes()
            )
        elif oddity == 3:
            head.insert(at, b"\xff\0")
        elif oddity == 4 and head[0][4:8] == b"JFIF":
            head[0] = head[0][:9] + b"\x02" + head[0][10:]
        elif oddity == 5 and head[0][4:8] == b"JFIF":
            head[0] = segment(0xEE, b"Adobe\0\x64\0\0\0\0\x07")
        elif oddity == 6:
            head.insert(at, segment(0xE2, b"ICC_PROFILE\0\x05\x02abc"))
        elif oddity == 7:
            head.insert(at, segment(0xFE, b"a comment") + b"and behind its end")
        elif oddity == 8:
            head.insert(at, b"\xff\xe7\0" + bytes((int(rng.integers(2)),)))
        elif oddity == 9:
            scan += saved(smooth(rng), "JPEG")  # as in MPO
        else:
            head.insert(at, b"\xff\xd0" + segment(0xED, b"Photoshop 3.0\0" + bytes(90)))
    content = b"\xff\xd8" + b"".join(head) + scan
    return content, shown, f"{words}, odd header: {', '.join(done)}"


def jpeg_cut(rng: Random) -> Made:
    content, _, words = plain(rng)
    end = int(rng.integers(3, len(content)))
    return content[:end], None, f"{words}, cut at {end} of {len(content)}"


def jpeg_damaged_scan(rng: Random) -> Made:
    """Damage that a decoder can see: Pillow shows grey or shifted blocks instead."""
    content = saved(smooth(rng, least=40), "JPEG", restart_marker_blocks=1, quality=90)
    head, scan = segments(content)
    start = b"\xff\xd8" + b"".join(head)
    first = scan.find(b"\xff\xd0")
    second = scan.find(b"\xff\xd1")
    damaged, what = [
        (scan[:first] + scan[first + 2 :], "a restart marker is missing"),
        (scan[:first] + b"\xff\xd3" + scan[first + 2 :], "a false restart marker"),
        (scan[: first + 2] + scan[second:], "a block is missing"),
        (scan[:first] + b"\xff\xd9", "the image ends early"),
    ][rng.integers(4)]
    return start + damaged, None, f"{what} ({UNLIKE_PILLOW})"


def jpeg_lost_table(rng: Random) -> Made:
    """A segment's length that reaches into the table behind it."""
    content, _, words = plain(rng)
    head, scan = segments(content)
    at = next(i for i, it in enumerate(head) if it[1] == 0xDB)
    head.insert(at, b"\xff\xe5\0\x08ab")
    return b"\xff\xd8" + b"".join(head) + scan, None, f"{words}, a length that lies"


JPEG_KINDS = (
    jpeg_plain,
    jpeg_turned,
    jpeg_odd_header,
    jpeg_cut,
    jpeg_damaged_scan,
    jpeg_lost_table,
)
