"""A checkpoint is complete or absent, verified before use, and never damages an older one."""

import json
import os
import pickle
import shutil
import stat
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open

from pipeline.checkpoints.folder import (
    DamagedCheckpointError,
    RunState,
    find_checkpoint,
    list_checkpoints,
    read_state,
    read_tensors,
    remove_unfinished,
    save_checkpoint,
    set_aside,
    verify_checkpoint,
)
from pipeline.checkpoints.retention import Keep, retain
from pipeline.common.errors import UserError
from pipeline.common.files import sha256_file
from pipeline.distributed.strategies.base import FullState
from pipeline.models.autoencoder import tensors_sha256

STATE = RunState(20, 240, 19, "order", "data", world=2, versions={"torch": torch.__version__})
FILES = ["model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json"]
FILES += ["MANIFEST.json"]


def some_tensors(seed: int = 0, *, ema: bool = True) -> FullState:
    """Tensors of both precisions, with the values that text or arithmetic would lose."""
    generator = torch.Generator().manual_seed(seed)
    model = {
        "a.weight": torch.randn(3, 4, 2, 2, generator=generator),
        "a.bias": torch.tensor([0.0, -0.0, torch.inf, torch.nan, 1e-45, torch.pi]),
        "b": torch.randn(2000, generator=generator, dtype=torch.float64),
        "empty": torch.zeros(0, 3),
    }
    moments = {name: torch.randn(value.shape) for name, value in model.items()}
    average = {name: value + 1 for name, value in model.items()} if ema else None
    return FullState(model, average, moments, {k: v**2 for k, v in moments.items()}, 19)


def saved(directory: Path, *steps: int) -> list[Path]:
    states = [replace(STATE, step=step) for step in steps]
    return [save_checkpoint(directory, state, some_tensors(state.step)) for state in states]


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


@pytest.mark.parametrize("ema", [True, False], ids=["ema", "no ema"])
def test_what_is_read_is_bit_for_bit_what_was_saved(tmp_path: Path, ema: bool):
    tensors = some_tensors(ema=ema)
    path = save_checkpoint(tmp_path / "checkpoints", STATE, tensors)
    verify_checkpoint(path)
    assert read_state(path) == STATE
    back = read_tensors(path)
    assert back.num_updates == 19
    assert (back.ema is None) == (not ema)
    for name in ("model", "exp_avg", "exp_avg_sq", *(["ema"] if ema else [])):
        assert tensors_sha256(getattr(back, name)) == tensors_sha256(getattr(tensors, name))
    assert {p.name for p in path.iterdir()} == set(FILES) - (set() if ema else {FILES[1]})
    assert [p.name for p in path.parent.iterdir()] == ["step-20"]


def test_before_the_first_update_there_are_no_moments(tmp_path: Path):
    path = save_checkpoint(tmp_path, STATE, replace(some_tensors(), exp_avg={}, exp_avg_sq={}))
    verify_checkpoint(path)
    assert read_tensors(path).exp_avg == read_tensors(path).exp_avg_sq == {}


def test_the_digest_sees_names_types_shapes_and_every_bit():
    one = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    values = [{"a": one}, {"b": one}, {"a": one.double()}, {"a": one.reshape(3, 2)}, {}]
    values += [{"a": torch.nextafter(one, one + 1)}, {"a": one, "b": one}, {"a": torch.tensor(1)}]
    assert len({tensors_sha256(value) for value in values}) == len(values)
    columns_first = one.T.contiguous().T
    assert tensors_sha256({"a": columns_first}) == tensors_sha256({"a": one})


def test_files_are_json_and_safetensors_and_readable_as_the_umask_allows(tmp_path: Path):
    path = saved(tmp_path, 20)[0]
    for file in path.iterdir():
        if file.suffix == ".json":
            json.loads(file.read_bytes())
        else:
            with safe_open(file, framework="pt") as opened:
                assert opened.keys()
    assert len({stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()}) == 1


def test_a_pickle_in_disguise_is_not_executed(tmp_path: Path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    path = saved(tmp_path, 20)[0]
    file = path / "model.safetensors"
    file.write_bytes(pickle.dumps(Bomb()))
    manifest = json.loads((path / "MANIFEST.json").read_bytes())
    manifest["files"][file.name] = {"bytes": file.stat().st_size, "sha256": sha256_file(file)}
    (path / "MANIFEST.json").write_text(json.dumps(manifest))
    verify_checkpoint(path)
    with pytest.raises(SafetensorError):
        read_tensors(path)
    assert not (tmp_path / "exploded").exists()


def is_damaged(path: Path) -> bool:
    try:
        verify_checkpoint(path)
    except DamagedCheckpointError:
        return True
    return False


def damaged_copies(path: Path, file: Path) -> Iterator[str]:
    """Damage one file in many ways, each time from the original; yield what was done.

    (A JSON file that only lost its last line end says the same: no damage.)
    """
    whole = file.read_bytes()
    for length in sorted({0, 1, len(whole) // 2, len(whole) - 2}):
        file.write_bytes(whole[:length])
        yield f"cut to {length}"
    for bit in range(0, 8 * len(whole), max(8 * len(whole) // 40, 1) | 1):
        file.write_bytes(whole)
        flip(file, bit)
        yield f"bit {bit}"
    file.write_bytes(whole + b"\0")
    yield "longer"
    file.write_bytes(bytes(len(whole)))
    yield "zeros"
    file.unlink()
    yield "missing"
    file.write_bytes(whole)


@pytest.mark.parametrize("name", FILES)
def test_any_damage_to_any_file_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
):
    """Then the previous one is used, unless the damaged one was chosen by its step."""
    older, newer = saved(tmp_path, 10, 20)
    for damage in damaged_copies(newer, newer / name):
        assert is_damaged(newer), damage
        assert find_checkpoint(tmp_path, None) == older, damage
        assert f"warning: skipping {newer}: " in capsys.readouterr().err
        with pytest.raises(UserError, match=r"step-20 is damaged: .*(json|safetensors)"):
            find_checkpoint(tmp_path, 20)
    verify_checkpoint(newer)
    assert find_checkpoint(tmp_path, None) == newer
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("stride", [13, pytest.param(1, marks=pytest.mark.soak)])
def test_a_flipped_bit_anywhere_in_the_manifest_is_found(tmp_path: Path, stride: int):
    path = saved(tmp_path, 20)[0]
    manifest = path / "MANIFEST.json"
    for bit in range(0, 8 * manifest.stat().st_size, stride):
        flip(manifest, bit)
        assert is_damaged(path), bit
        flip(manifest, bit)
    verify_checkpoint(path)


@pytest.mark.parametrize("name", sorted(set(FILES) - {"MANIFEST.json"}))
def test_a_manifest_must_list_what_a_resume_would_read(tmp_path: Path, name: str):
    path = saved(tmp_path, 20)[0]
    manifest = json.loads((path / "MANIFEST.json").read_bytes())
    del manifest["files"][name]
    (path / "MANIFEST.json").write_text(json.dumps(manifest))
    with pytest.raises(DamagedCheckpointError, match=f"does not list {name}"):
        verify_checkpoint(path)


@pytest.mark.parametrize("text", ["[]", "null", "3", "{}", '{"files": []}', '{"files": {"a": 1}}'])
def test_a_manifest_of_another_shape_is_damage(tmp_path: Path, text: str):
    path = saved(tmp_path, 20)[0]
    (path / "MANIFEST.json").write_text(text)
    with pytest.raises(DamagedCheckpointError):
        verify_checkpoint(path)


def test_a_checkpoint_that_is_not_there_is_told_with_those_that_are(tmp_path: Path):
    with pytest.raises(UserError, match="has the run saved one yet"):
        find_checkpoint(tmp_path / "none", None)
    saved(tmp_path, 100, 20)
    with pytest.raises(UserError, match="step-30; there: step-20, step-100"):
        find_checkpoint(tmp_path, 30)


def test_checkpoints_are_ordered_by_number_and_nothing_else_is_one(tmp_path: Path):
    saved(tmp_path, 9, 100, 20)
    for name in ("step-7.tmp-0123", "step-200.corrupt-0123", "step-", "steps-3", "step-x"):
        (tmp_path / name).mkdir()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-100", "step-20", "step-9"]
    assert list_checkpoints(tmp_path / "none") == []


def test_retention_keeps_the_newest(tmp_path: Path):
    saved(tmp_path, 9, 100, 20, 30)
    (tmp_path / "step-8.corrupt-0123").mkdir()
    retain(tmp_path, Keep(latest=2), {})
    left = {"step-100", "step-30", "step-8.corrupt-0123"}
    assert {path.name for path in tmp_path.iterdir()} == left
    retain(tmp_path, Keep(latest=2), {})
    assert {path.name for path in tmp_path.iterdir()} == left


def test_litter_of_killed_saves_is_removed_and_nothing_else(tmp_path: Path):
    path = saved(tmp_path, 20)[0]
    shutil.copytree(path, tmp_path / "step-30.tmp-0123")
    (tmp_path / "step-30.tmp-0123" / FILES[0]).unlink()
    (tmp_path / "step-10.corrupt-0123").mkdir()
    remove_unfinished(tmp_path)
    remove_unfinished(tmp_path / "none")
    assert {p.name for p in tmp_path.iterdir()} == {"step-20", "step-10.corrupt-0123"}
    verify_checkpoint(path)


def test_an_existing_step_is_kept(tmp_path: Path):
    path = saved(tmp_path, 20)[0]
    before = {file: (file.stat().st_ino, sha256_file(file)) for file in path.iterdir()}
    assert save_checkpoint(tmp_path, STATE, some_tensors(seed=99)) == path
    assert {file: (file.stat().st_ino, sha256_file(file)) for file in path.iterdir()} == before


def test_a_damaged_checkpoint_is_set_aside_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for _ in range(2):  # the same step may be damaged again
        set_aside(saved(tmp_path, 20)[0], "one bit is wrong")
    assert len(list(tmp_path.glob("step-20.corrupt-*"))) == 2
    assert list_checkpoints(tmp_path) == []
    assert "step-20 is damaged (one bit is wrong)" in capsys.readouterr().err
