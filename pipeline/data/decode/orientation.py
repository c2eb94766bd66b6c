"""Which way up an image is: its Exif orientation, or that of XMP where Exif has none.

    metadata of a file, by Pillow's names --orientation_in--> 1 to 8
    stored pixels, orientation --upright--> pixels as people see them

Pillow decides; this is the one place that asks it.
"""

from collections.abc import Mapping

from PIL import Image

from pipeline.data.decode.pixels import Pixels

ORIENTATION = 0x0112  # the tag (CIPA DC-008)
TURNED = (5, 6, 7, 8)  # the orientations that swap height and width


def orientation_of(image: Image.Image) -> int:
    """The orientation of an image that Pillow holds; unreadable metadata counts as none."""
    try:
        found = image.getexif().get(ORIENTATION, 1)
    except Exception:  # noqa: BLE001
        # Pillow raises many kinds of errors here. None of them says anything about the pixels.
        return 1
    return int(found) if found in range(1, 9) else 1


def orientation_in(metadata: Mapping[str, bytes | str]) -> int:
    """The orientation that Pillow would find in such an `Image.info`."""
    if not metadata:
        return 1
    image = Image.new("1", (1, 1))
    image.info.update(metadata)
    return orientation_of(image)


def upright(pixels: Pixels, orientation: int) -> Pixels:
    """Undo an orientation: mirror and turn the stored pixels."""
    if orientation in TURNED:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels
