"""The memory of an export does not grow with the number of images.

At a time there are, whatever the number of shards:

    AHEAD + 1 batches of stored values     read and decoded in advance
    three tasks' rows                      being encoded, waiting, being written
    one task's rows once more              where batches become a task, and a task a file

Only `finalize` holds something of every image, its key: 220 to 400 bytes of memory each.
"""

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from pipeline.common import strict
from pipeline.data.index import build_index
from tests.export.world import make_config, make_run
from tests.processes import CPU_ENV, ROOT
from tests.shards import png

PER_SHARD = 2000
FIRST_SHARDS = 4  # enough that all of the above is there at once
CONSTANT_BYTES = 20e6  # by which two runs of the same may differ
BYTES_PER_KEY = 400
SIZE = 256  # latents: 2 KB of an image in float32; its stored values take 1 KB
# The peak of this very program: ru_maxrss would remember that of the one which started it.
CHILD = """
import re, sys
from pathlib import Path
from pipeline.export.__main__ import main
code = main(sys.argv[1:])
print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
sys.exit(code)
"""


def write_tiny_images(folder: Path, num_shards: int) -> Path:
    """Write shards of PER_SHARD samples with a key of their own and all the same 8 x 8 picture."""
    folder.mkdir()
    content = png(np.full((8, 8, 3), 77, np.uint8))
    padded = content + bytes(-len(content) % tarfile.BLOCKSIZE)
    for shard in range(num_shards):
        with (folder / f"tiny-{shard:04d}.tar").open("wb") as file:
            for number in range(shard * PER_SHARD, (shard + 1) * PER_SHARD):
                info = tarfile.TarInfo(f"{number:08d}.png")
                info.size = len(content)
                file.write(info.tobuf(tarfile.USTAR_FORMAT) + padded)
            file.write(bytes(2 * tarfile.BLOCKSIZE))
    build_index(folder)
    return folder


def peak_bytes(run_dir: Path, data: Path, out: Path) -> int:
    """Export, and return the process's largest resident memory."""
    config = out.with_suffix(".yaml")
    settings = {"data": {"path": str(data)}, "formats": [{"kind": "parquet"}], "batch_size": 64}
    config.write_text(strict.dump(make_config(run_dir, out, **settings)))
    done = subprocess.run(
        [sys.executable, "-c", CHILD, config],
        env=CPU_ENV,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    shutil.rmtree(out)
    return int(done.stdout) * 1024


@pytest.mark.parametrize(
    "num_images",
    [
        pytest.param(40_000, marks=pytest.mark.slow),
        pytest.param(200_000, marks=[pytest.mark.soak, pytest.mark.timeout(1800)]),
    ],
)
def test_memory_does_not_grow_with_the_number_of_images(tmp_path: Path, num_images: int):
    few = write_tiny_images(tmp_path / "few", FIRST_SHARDS)
    many = write_tiny_images(tmp_path / "many", num_images // PER_SHARD)
    run_dir = make_run(tmp_path / "run", few, {"bottleneck": {"kind": "gaussian", "size": SIZE}})
    base = peak_bytes(run_dir, few, tmp_path / "out-few")
    grown = peak_bytes(run_dir, many, tmp_path / "out-many") - base
    print(f"{base / 1e6:.0f} MB, and {grown / 1e6:.0f} MB more for {num_images:,} images")
    assert grown <= CONSTANT_BYTES + BYTES_PER_KEY * (num_images - FIRST_SHARDS * PER_SHARD)
