"""Local disks and file servers are told apart, and set how many threads read."""

import subprocess
import threading
from pathlib import Path

import pytest

from pipeline.data.decode import ImageDecode
from pipeline.data.index import Index
from pipeline.data.settings import DataConfig
from pipeline.data.storage.local import LocalStorage
from pipeline.data.storage.mounts import MOUNTS, NETWORKED, filesystem_type, is_networked
from tests.shards import open_stream

TABLE = """\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
30 22 0:30 / /home rw - nfs4 server:/home rw,vers=4.2
31 22 0:31 / /scratch rw - lustre 10.0.0.1@tcp:/scratch rw
32 31 8:2 / /scratch/local\\040disk rw - xfs /dev/sdb1 rw
33 22 0:33 / /mnt/bucket rw - fuse.s3fs s3fs rw
34 22 0:34 / /stacked rw - ext4 /dev/sdc1 rw
35 34 0:35 / /stacked rw - beegfs beegfs_nodev rw
"""


@pytest.mark.parametrize(
    ("path", "expected", "networked"),
    [
        ("/data", "ext4", False),
        ("/home", "nfs4", True),
        ("/homes/x", "ext4", False),  # only begins like a mount point
        ("/scratch/set/a.tar", "lustre", True),
        ("/scratch/local disk/set", "xfs", False),
        ("/mnt/bucket/set", "fuse.s3fs", True),
        ("/stacked/x", "beegfs", True),  # the later mount lies on top
    ],
)
def test_the_longest_mount_point_decides(path: str, expected: str, networked: bool):
    found = filesystem_type(path, TABLE)
    assert found == expected
    assert (NETWORKED.match(found) is not None) == networked


def test_this_machine_agrees_with_its_own_tools(tmp_path: Path):
    asked = ["df", "--output=fstype", str(tmp_path)]
    told = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()[-1]
    assert filesystem_type(str(tmp_path.resolve()), MOUNTS.read_text()) == told


def test_readers_follow_the_file_system(tmp_path: Path):
    assert LocalStorage(str(tmp_path)).num_readers == (8 if is_networked(str(tmp_path)) else 0)


@pytest.mark.parametrize("asked", [None, 0, 3])
def test_a_stream_starts_as_many_read_threads(tiny_shards: Path, asked: int | None):
    """None of its own on a disk of this machine: the decoding threads fetch, too."""
    data = DataConfig(path=str(tiny_shards), decode=ImageDecode(size=32), read_threads=asked)
    with open_stream(data, index=Index.open(tiny_shards), seed=0, batch_size=12) as stream:
        assert next(stream).weight.sum() == 12
        names = [thread.name for thread in threading.enumerate()]
    expected = LocalStorage(str(tiny_shards)).num_readers if asked is None else asked
    assert sum(name.startswith("stream-read") for name in names) == expected
    assert sum(name.startswith("stream-decode") for name in names) == data.threads
