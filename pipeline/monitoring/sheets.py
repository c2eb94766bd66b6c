"""What an evaluation shows besides its figures, as files.

NAME-STEP.json       keys and values of the images that are shown, vectors of the metrics
NAME-STEP.png        the pictured images; KIND-NAME-STEP.png those of another kind
"""

import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.common.console import warn
from pipeline.common.files import write_atomic


@dataclass(frozen=True)
class Sheet:
    """Pictures of one evaluation, and what is to be known about them."""

    pictures: Mapping[str, NDArray[np.uint8]]  # by kind, "" the pictured images: [H, W, 3]
    contents: Mapping[str, Any] = field(default_factory=dict[str, Any])  # of the JSON file

    def files(self, step: int, name: str) -> Iterator[tuple[str, bytes]]:
        """Yield the files of an evaluation at a step, as (file name, content)."""
        if self.contents:
            # Python's json writes NaN as NaN: a broken number stays visible.
            text = json.dumps({"step": step, **self.contents}, indent=1, ensure_ascii=False)
            yield f"{name}-{step:08d}.json", f"{text}\n".encode()
        for kind, pixels in self.pictures.items():
            content = io.BytesIO()
            Image.fromarray(pixels).save(content, "PNG")
            whole = f"{kind}-{name}" if kind else name
            yield f"{whole}-{step:08d}.png", content.getvalue()


def write_sheet(folder: Path, step: int, name: str, sheet: Sheet) -> list[Path]:
    """Write the files of an evaluation to `folder`, which is made; return those that are written.

    A file that cannot be written is a warning: nobody loses an evaluation for a picture.
    """
    written: list[Path] = []
    for file_name, content in sheet.files(step, name):
        path = folder / file_name
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomic(path, content)
        except OSError as error:
            warn(f"{path} could not be written ({error})")
            continue
        written.append(path)
    return written
