"""Large shards that take no room: headers are written, the values are holes in the file."""

import io
import tarfile
from pathlib import Path

import numpy as np

BLOCK = 512


def write_sparse_shards(
    folder: Path, num_shards: int, per_shard: int, sample_bytes: int
) -> tuple[int]:
    """Write big-00.tar ..., each member a uint8 `.npy` file of zeros; return the arrays' shape."""
    header = io.BytesIO()
    shape = (sample_bytes - 128,)  # numpy's header takes 128 bytes
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": shape}
    )
    assert header.tell() == 128
    assert sample_bytes % BLOCK == 0
    for shard in range(num_shards):
        with (folder / f"big-{shard:02d}.tar").open("wb") as file:
            for number in range(per_shard):
                info = tarfile.TarInfo(f"{shard:02d}-{number:06d}.npy")
                info.size = sample_bytes
                file.write(info.tobuf(tarfile.USTAR_FORMAT))
                file.write(header.getvalue())
                file.seek(shape[0], io.SEEK_CUR)
            file.truncate(file.tell() + 2 * BLOCK)
    return shape
