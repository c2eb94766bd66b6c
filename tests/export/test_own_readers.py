"""`verify` reads each file by its format's own reader and as LatentDataset does.

Here files are written that one of them takes and another refuses or reads otherwise; the hashes in
the manifest are theirs, as if our writer had written them.
"""

import json
import shutil
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors import SafetensorError, deserialize

from pipeline.common.errors import DONE, UserError
from pipeline.export.verify.levels import LEVELS, verify_export
from pipeline.latents import LatentDataset
from pipeline.latents.formats import READERS
from pipeline.latents.formats.writers import SafetensorsWriter
from tests.export.foreign import picture, write_shards
from tests.export.test_verify import seal
from tests.export.world import make_config, run_export

NUM_ROWS = 6
SAFETENSORS = "data/safetensors/0.safetensors"


@pytest.fixture(scope="module")
def written(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shard with texts in all formats; not to be changed."""
    folder = tmp_path_factory.mktemp("own")
    members: dict[str, bytes] = {}
    for i in range(NUM_ROWS):
        members |= {f"{i}.png": picture(i), f"{i}.cls": b"%d" % i, f"{i}.txt": b"text %d" % i}
    data = write_shards(folder / "data", {"0.tar": members})
    formats = [{"kind": kind} for kind in READERS]
    config = make_config(run_dir, folder / "out", formats=formats, data={"path": str(data)})
    assert run_export(config) == DONE
    assert verify_export(folder / "out", source=data).notes == []
    return folder / "out"


@pytest.fixture
def change(written: Path, tmp_path: Path) -> Callable[[str, Callable[[bytes], bytes]], Path]:
    """Replace a file of a copy of the export, with hashes that fit."""

    def make(name: str, edit: Callable[[bytes], bytes]) -> Path:
        out = Path(shutil.copytree(written, tmp_path / "out"))
        (out / name).write_bytes(edit((out / name).read_bytes()))
        seal(out)
        assert verify_export(out, level="hashes").problems == []
        return out

    return make


def problems_of(out: Path) -> list[str]:
    """What the levels find that look into the files: all of them the same."""
    found = verify_export(out, level="keys").problems
    assert set(found) <= set(verify_export(out, level=LEVELS[-2]).problems)
    return found


def with_header(edit: Callable[[str], str]) -> Callable[[bytes], bytes]:
    """Edit the JSON before the tensors of a safetensors file."""

    def apply(data: bytes) -> bytes:
        length = int.from_bytes(data[:8], "little")
        text = edit(data[8 : 8 + length].decode().rstrip()).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text + data[8 + length :]

    return apply


def ours(text: str) -> str:
    return json.dumps(json.loads(text)["__metadata__"]["latentmill"])


HEADERS: dict[str, Callable[[str], str]] = {
    "metadata that is no text": lambda text: text.replace(ours(text), "5"),
    "metadata that is nested": lambda text: text.replace(ours(text), f"[{ours(text)}]"),
    "metadata twice": lambda text: text[:-1] + ',"__metadata__":{"a":NaN}}',
}


@pytest.mark.parametrize("name", HEADERS)
def test_safetensors_that_we_read_and_the_library_refuses(change: Callable[..., Path], name: str):
    out = change(SAFETENSORS, with_header(HEADERS[name]))
    assert len(SafetensorsWriter().read(out / SAFETENSORS)) == NUM_ROWS
    assert len(LatentDataset(out, format="safetensors")[:].keys) == NUM_ROWS
    with pytest.raises(SafetensorError):
        deserialize((out / SAFETENSORS).read_bytes())
    (problem,) = problems_of(out)
    assert problem.startswith(f"{SAFETENSORS}: the safetensors library cannot read it: ")


def last_header_broken(data: bytes) -> bytes:
    """Another checksum in the header of the last member, which is a text."""
    broken = bytearray(data)
    broken[data.rindex(b".txt\0") // 512 * 512 + 150] ^= 1
    return bytes(broken)


def test_a_tar_that_we_read_and_tarfile_ends_early(change: Callable[..., Path]):
    name = "data/tar/0.tar"
    out = change(name, last_header_broken)
    with tarfile.open(out / name) as tar:
        assert tar.getnames()[-1] == f"{NUM_ROWS - 1}.row.json"  # and no word
    assert LatentDataset(out, format="tar")[-1].text == f"text {NUM_ROWS - 1}"
    problems = problems_of(out)
    expected = "LatentDataset reads other values (text) than the format's own reader"
    assert f"{name}: {expected}" in problems


def test_a_parquet_file_that_pyarrow_reads_and_we_do_not(change: Callable[..., Path]):
    name = "data/parquet/0.parquet"
    out = change(name, lambda data: data)
    pq.write_table(pq.read_table(out / name), out / name, compression="ZSTD")
    seal(out)
    with pytest.raises(UserError, match="compressed"):
        LatentDataset(out, format="parquet")[:]
    (problem,) = problems_of(out)
    assert problem.startswith(f"{name}: LatentDataset cannot read it: holds mu compressed")


def test_a_matrix_of_another_version_of_the_format(change: Callable[..., Path]):
    """numpy reads it as well as the first one."""
    name = "data/npy/0.npy"
    out = change(name, lambda data: data)
    matrix = np.load(out / name)
    with (out / name).open("wb") as file:
        np.lib.format.write_array(file, matrix, version=(2, 0))
    seal(out)
    (problem,) = problems_of(out)
    assert problem == f"{name}: LatentDataset cannot read it: is no .npy file"


def test_without_the_library_the_report_says_so(written: Path, monkeypatch: pytest.MonkeyPatch):
    """As in a light installation: its import fails."""
    monkeypatch.setitem(sys.modules, "safetensors", None)
    report = verify_export(written)
    assert report.problems == []
    assert "the safetensors library is not installed here" in report.notes[-1]
