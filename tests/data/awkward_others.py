"""WebP, GIF, BMP, TIFF and PPM: alpha, palettes, 16 bits, orientation, and files that end early."""

import io
import struct

import numpy as np
from PIL import Image

from tests.data.image_truth import (
    UNLIKE_PILLOW,
    Made,
    Random,
    by_pillow,
    exif,
    over_white,
    saved,
    smooth,
    turned,
    xmp,
)

TIFF_ORIENTATION = 0x0112


def webp_lossless(rng: Random) -> Made:
    pixels = smooth(rng, int(rng.choice([3, 4])))
    shown = over_white(pixels[..., :3], pixels[..., 3]) if pixels.shape[2] == 4 else pixels
    orientation = int(rng.integers(1, 9))
    metadata = [{}, {"exif": exif(orientation)}, {"xmp": xmp(orientation)}][rng.integers(3)]
    content = saved(pixels, "WEBP", lossless=True, **metadata)
    shown = turned(shown, orientation) if metadata else shown
    return content, shown, f"{pixels.shape[2]} channels, {orientation} in {sorted(metadata)}"


def webp_lossy(rng: Random) -> Made:
    content = saved(smooth(rng), "WEBP", quality=80)
    if rng.random() < 0.5:
        content += b"behind the end"
    return content, by_pillow(content), "lossy"


def webp_damaged(rng: Random) -> Made:
    content = saved(smooth(rng, int(rng.choice([3, 4]))), "WEBP", lossless=bool(rng.integers(2)))
    if rng.random() < 0.5:
        end = int(rng.integers(12, len(content)))
        return content[:end], None, f"cut at {end} of {len(content)}"
    (size,) = struct.unpack_from("<I", content, 4)
    return content[:4] + struct.pack("<I", size + 2) + content[8:], None, "its size lies"


def gif(rng: Random, may_move: bool = True) -> Made:
    """256 colours, one of them perhaps transparent; perhaps a second frame."""
    values = smooth(rng, 1)
    palette = rng.integers(0, 256, (256, 3)).astype(np.uint8)
    image = Image.fromarray(values[:, :, 0])
    image.putpalette(palette.tobytes())
    clear = int(values[0, 0, 0])
    is_clear, is_moving = rng.random(2) < 0.5
    options = {"transparency": clear} if is_clear else {}
    if is_moving and may_move:
        options |= {"save_all": True, "append_images": [image.rotate(180)], "disposal": 2}
    file = io.BytesIO()
    image.save(file, "GIF", optimize=False, **options)
    alpha = np.where((values[:, :, 0] == clear) & is_clear, 0, 255)
    return file.getvalue(), over_white(palette[values[:, :, 0]], alpha), f"{sorted(options)}"


def tif(rng: Random) -> Made:
    """Any compression and orientation; 8 bits of colour or grey, or 16 of grey."""
    orientation = int(rng.integers(1, 9))
    compression = rng.choice(["raw", "tiff_lzw", "tiff_adobe_deflate", "packbits"])
    options = {"compression": compression, "tiffinfo": {TIFF_ORIENTATION: orientation}}
    pixels = smooth(rng, int(rng.choice([1, 3, 4])))
    words = f"{compression}, orientation {orientation}"
    if pixels.shape[2] == 1 and rng.random() < 0.5:
        deep = pixels[:, :, 0].astype(np.uint16) * 256 + 77
        file = io.BytesIO()
        Image.fromarray(deep).save(file, "TIFF", **options)
        content, words = file.getvalue(), f"{words}, 16 bits ({UNLIKE_PILLOW})"
    else:
        content = saved(pixels, "TIFF", **options)
    shown = over_white(pixels[..., :3], pixels[..., 3]) if pixels.shape[2] == 4 else pixels
    return content, turned(shown.repeat(3 // shown.shape[2], axis=2), orientation), words


def bmp(rng: Random) -> Made:
    pixels = smooth(rng, int(rng.choice([1, 3])))
    return saved(pixels, "BMP"), pixels.repeat(3 // pixels.shape[2], axis=2), ""


def ppm(rng: Random) -> Made:
    """PPM and PGM of 8 bits, and PGM of 16."""
    pixels = smooth(rng, int(rng.choice([1, 3])))
    shown = pixels.repeat(3 // pixels.shape[2], axis=2)
    if pixels.shape[2] == 3 or rng.random() < 0.5:
        return saved(pixels, "PPM"), shown, "8 bits"
    height, width, _ = pixels.shape
    deep = (pixels.astype(np.uint16) * 256 + 77).astype(">u2")
    content = b"P5 %d %d 65535\n" % (width, height) + deep.tobytes()
    return content, shown, f"16 bits ({UNLIKE_PILLOW})"


def other_cut(rng: Random) -> Made:
    still = (lambda rng: gif(rng, may_move=False), tif, bmp, ppm)
    content, _, words = still[rng.integers(4)](rng)
    # The last bytes of GIF and TIFF may be an end mark or a directory's padding.
    end = int(rng.integers(2, len(content) * 9 // 10))
    return content[:end], None, f"{words}, cut at {end} of {len(content)}"


OTHER_KINDS = (webp_lossless, webp_lossy, webp_damaged, gif, tif, bmp, ppm, other_cut)
