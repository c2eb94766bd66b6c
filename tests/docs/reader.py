"""A person who types what the pages say, in a folder that has photos and nothing else of ours.

The commands on the person's PATH are shims (`tests.docs.shim`), which say what is cut short.
"""

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
from PIL import Image

from tests import forkserver
from tests.docs.blocks import Block
from tests.processes import CPU_ENV

TIMEOUT = 300  # seconds, for one block, on a machine that does much else, too
NUM_PHOTOS = 80  # of each class
SHIM = Path(__file__).with_name("shim.py")


def make_photos(folder: Path) -> None:
    """Write PHOTOS: two classes of coloured discs as JPEG files, and one that is broken."""
    numbers = np.random.default_rng(0)
    rows, columns = np.mgrid[:72, :96]
    for name in ("cats", "dogs"):
        (folder / name).mkdir(parents=True)
        for number in range(NUM_PHOTOS):
            y, x, radius = numbers.uniform((20, 20, 8), (52, 76, 20))
            disc = (rows - y) ** 2 + (columns - x) ** 2 < radius**2
            colours = numbers.integers(0, 256, (2, 3), dtype=np.uint8)
            pixels = colours[disc.astype(int)]
            Image.fromarray(pixels).save(folder / name / f"{number:04}.jpg", quality=90)
    (folder / "cats" / "broken.jpg").write_bytes(b"no picture")


def make_shims(folder: Path, installation: Path | None = None) -> None:
    """Write the commands that the person has.

    installation: a folder that our wheel was installed into. Then nothing is forked, and nothing of
    the repository is imported.
    """
    folder.mkdir()
    real, server = Path(sys.executable).parent, ""
    if installation is None:
        server = forkserver.server()
    argv = (sys.executable, "-I", "-S", SHIM, server, real, folder)
    for name in ("latentmill", "python", "accelerate"):
        command = shlex.join(map(str, (*argv, name)))
        finds = f"export PYTHONPATH={shlex.quote(str(installation))}\n" if installation else ""
        (folder / name).write_text(f'#!/bin/sh\n{finds}exec {command} "$@"\n')
        (folder / name).chmod(0o755)


def type_blocks(blocks: Sequence[Block], folder: Path, shims: Path) -> None:
    """Type blocks in turn, in `folder`; one that does not end as it says fails with its output."""
    for language, text, last in scripts(blocks):
        if "file" in last.options:
            (folder / last.options["file"]).write_text(text)
            continue
        script = shims / f"{last.page.stem}-{last.line}.{'py' if language == 'python' else 'sh'}"
        script.write_text(text)
        argv = ["bash", "-euo", "pipefail", str(script)]
        if language == "python":
            argv = [str(shims / "python"), str(script)]
        code, output = typed(argv, folder, shims)
        wanted = int(last.options.get("exit", 0))
        assert code == wanted, f"{last.where} ended with {code}:\n{text}\nIt printed:\n{output}"


def scripts(blocks: Sequence[Block]) -> Iterator[tuple[str, str, Block]]:
    """(language, text, last block) of what is run as one: blocks of Python in a row are."""
    typed_in = [b for b in blocks if b.language in ("console", "python") or "file" in b.options]
    runnable = [b for b in typed_in if "norun" not in b.options]
    for language, group in groupby(runnable, key=lambda block: block.language):
        members = [*group]
        if language != "python":
            yield from ((language, block.text, block) for block in members)
            continue
        text = ""
        for block in members:  # line by line as on the page, so that tracebacks name its lines
            text += "\n" * (block.line - text.count("\n")) + block.text
        yield language, text, members[-1]


def typed(argv: Sequence[str], folder: Path, shims: Path) -> tuple[int, str]:
    """Run a command in the folder; return its exit code and what it printed."""
    env = {name: os.environ[name] for name in ("LANG", "TMPDIR") if name in os.environ}
    env |= {name: value for name, value in CPU_ENV.items() if name != "PYTHONPATH"}
    real = Path(sys.executable).parent
    env |= {"PATH": f"{shims}:{real}:/usr/bin:/bin", "HOME": str(shims), "COLUMNS": "100"}
    log = shims / "log"
    log.write_bytes(b"")
    with log.open("ab") as both:  # as both streams, and as a file to add to by who opens it anew
        ended = subprocess.run(
            argv, cwd=folder, env=env, stdout=both, stderr=both, timeout=TIMEOUT, check=False
        )
    return ended.returncode, log.read_text(errors="replace")
