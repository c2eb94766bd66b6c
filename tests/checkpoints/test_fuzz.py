"""A real checkpoint, damaged in every file at seeded offsets: always found, never loaded.

`test_checkpoint` holds the protocol, on made-up tensors; here lies what a training really saved.
"""

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.checkpoints.folder import DamagedCheckpointError, read_state, verify_checkpoint
from pipeline.train import main
from tests.checkpoints.test_resume import NUM_STEPS, outcome, result_of, write_config

FILES = ("MANIFEST.json", "ema.safetensors", "model.safetensors", "optimizer.safetensors")
FILES += ("state.json",)
NUM_OFFSETS = 20
BLOCK = 512  # bytes: a sector that was never written


@pytest.fixture(scope="module")
def trained(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a few steps on small images."""
    folder = tmp_path_factory.mktemp("fuzz")
    config = write_config(folder, tiny_shards)
    small = ("data.decode.size=8", "model.backbone={kind: mlp, hidden: [16]}", "num_steps=6")
    assert main([str(config), *small]) == 0
    return folder / "run"


@pytest.fixture
def checkpoint(trained: Path, tmp_path: Path) -> Path:
    """A copy of its last checkpoint."""
    return Path(shutil.copytree(trained / "checkpoints" / "step-6", tmp_path / "step-6"))


def is_found(checkpoint: Path) -> bool:
    try:
        verify_checkpoint(checkpoint)
    except DamagedCheckpointError:
        return True
    return False


def damages(whole: bytes, name: str) -> Iterator[tuple[str, bytes | None]]:
    """Damaged contents of one file (None: the file is missing), all unlike the original."""
    chance = random.Random(name)
    yield "deleted", None
    yield "zeros", bytes(len(whole))
    for _ in range(NUM_OFFSETS):
        offset, bit = chance.randrange(len(whole)), chance.randrange(8)
        yield f"cut at {offset}", whole[:offset]
        flipped = bytes([whole[offset] ^ 1 << bit])
        yield f"bit {bit} of byte {offset}", whole[:offset] + flipped + whole[offset + 1 :]
        zeros = (
            whole[:offset] + bytes(len(whole[offset : offset + BLOCK])) + whole[offset + BLOCK :]
        )
        if zeros != whole:
            yield f"{BLOCK} zeros at {offset}", zeros


@pytest.mark.parametrize("name", FILES)
def test_damage_to_any_file_is_found(checkpoint: Path, name: str):
    assert {path.name for path in checkpoint.iterdir()} == set(FILES)
    verify_checkpoint(checkpoint)
    whole = (checkpoint / name).read_bytes()
    kinds = set()
    for what, content in damages(whole, name):
        kinds.add(what.split(" at")[0].split(" of")[0])
        if content is None:
            (checkpoint / name).unlink()
        else:
            (checkpoint / name).write_bytes(content)
        assert is_found(checkpoint) or says_the_same(name, whole, content), what
    assert len(kinds) >= 8
    (checkpoint / name).write_bytes(whole)
    verify_checkpoint(checkpoint)


def says_the_same(name: str, whole: bytes, content: bytes | None) -> bool:
    """Only of the manifest, which no other file vouches for: without its last line end."""
    return name == FILES[0] and content == whole[:-1] and whole.endswith(b"\n")


def test_no_flipped_bit_of_the_manifest_goes_unnoticed(checkpoint: Path):
    """Nothing vouches for the manifest; but all that it says is checked: names by the files that
    must be there, sizes and hashes by their bytes, the format by its name, the rest by the syntax.
    """
    path = checkpoint / "MANIFEST.json"
    whole = path.read_bytes()
    for bit in range(8 * len(whole)):
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        assert is_found(checkpoint), f"bit {bit % 8} of byte {bit // 8}"


ELSEWHERE = """
import os, sys
from pathlib import Path
from pipeline.train import main

os.chdir(Path(sys.argv[1]) / f"rank-{os.environ['RANK']}")  # its own disk: run_dir is relative
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.fault
@pytest.mark.distributed
@pytest.mark.soak
@pytest.mark.parametrize("damaged_on", [0, 1])
def test_damage_that_one_of_two_processes_sees_makes_both_fall_back(
    tmp_path: Path, tiny_shards: Path, run_processes: Callable, damaged_on: int
):
    """As if the cache of a network disk were out of date on one machine."""
    config = write_config(tmp_path, tiny_shards)
    script = tmp_path / "elsewhere.py"
    script.write_text(ELSEWHERE)
    (tmp_path / "rank-0").mkdir()
    (tmp_path / "rank-1").mkdir()
    run = tmp_path / "rank-0" / "run"
    first = run_processes(script, 2, tmp_path, config, "run_dir=run")
    assert first.code == 0, first.output
    expected = result_of(run)

    shutil.copytree(run, tmp_path / "rank-1" / "run")
    newest = tmp_path / f"rank-{damaged_on}" / "run" / "checkpoints" / f"step-{NUM_STEPS}"
    content = (newest / "optimizer.safetensors").read_bytes()
    (newest / "optimizer.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    again = run_processes(script, 2, tmp_path, config, "run_dir=run")
    assert again.code == 0, again.output
    reason = "optimizer.safetensors does not have the sha256 of the manifest"
    reason = reason if damaged_on == 0 else "it does not verify on another process"
    where = f"run/checkpoints/step-{NUM_STEPS}"
    assert again.output.count(f"warning: the checkpoint {where} is damaged ({reason})") == 1
    assert "step 19/20 " in again.output
    assert "step 18/20 " not in again.output
    assert result_of(run) == expected
    assert outcome(run)["status"] == "done"
    assert read_state(run / "checkpoints" / f"step-{NUM_STEPS}").step == NUM_STEPS
