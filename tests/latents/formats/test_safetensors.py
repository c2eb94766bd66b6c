"""safetensors: what the library itself reads, with torch and with numpy, and bfloat16."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from safetensors.torch import load_file
from safetensors.torch import save_file as save_torch

from pipeline.latents.formats.safetensors.writer import from_bits, to_bits
from pipeline.latents.formats.writers import SafetensorsWriter
from tests.latents.formats.test_contract import make_rows


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_torch_loads_latents_of_their_type_and_shape(dtype: str, tmp_path: Path):
    rows = make_rows((2, 3, 4), dtype)
    SafetensorsWriter().write(tmp_path / "s.safetensors", rows)
    tensors = load_file(tmp_path / "s.safetensors")
    for field, values in rows.latents.items():
        assert tensors[field].dtype == getattr(torch, dtype)
        expected = torch.from_numpy(values).to(tensors[field].dtype)
        assert torch.equal(tensors[field], expected)
    assert tensors["valid"].tolist() == rows.valid.tolist()
    assert tensors["row"].tolist() == rows.rows.tolist()
    assert tensors["label"].tolist() == rows.labels.tolist()


def test_bfloat16_takes_half_the_bytes(tmp_path: Path):
    sizes = {}
    for dtype in ("float32", "bfloat16"):
        SafetensorsWriter().write(tmp_path / dtype, make_rows((4, 16, 16), dtype, n=64))
        sizes[dtype] = (tmp_path / dtype).stat().st_size
    assert sizes["float32"] - sizes["bfloat16"] == 2 * 64 * 4 * 16 * 16 * 2


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_bytes_are_those_of_the_library(dtype: str, tmp_path: Path):
    SafetensorsWriter().write(tmp_path / "ours", make_rows((2, 3, 4), dtype, n=7))
    with safe_open(tmp_path / "ours", "pt") as file:
        metadata = file.metadata()
    save_torch(load_file(tmp_path / "ours"), tmp_path / "theirs", metadata=metadata)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_texts_read_as_documented_without_torch(tmp_path: Path):
    rows = make_rows()
    SafetensorsWriter().write(tmp_path / "s.safetensors", rows)
    with safe_open(tmp_path / "s.safetensors", "np") as file:
        assert json.loads(file.metadata()["latentmill"])["fields"] == ["mu", "logvar"]
        np.testing.assert_array_equal(file.get_slice("mu")[2:5], rows.latents["mu"][2:5])
        for name, texts in (("key", rows.keys), ("metadata", rows.metadata), ("text", rows.texts)):
            data = file.get_tensor(f"{name}_bytes").tobytes()
            ends = file.get_tensor(f"{name}_offsets")
            found = [data[ends[i] : ends[i + 1]].decode() for i in range(len(rows))]
            assert [text or None for text in found] == list(texts)


def test_bfloat16_bits_are_those_of_torch():
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    values = bits.view(torch.bfloat16).float()
    finite = values[torch.isfinite(values)].numpy()
    assert len(finite) == 2 * 0x7F80
    assert (to_bits(finite) == bits[torch.isfinite(values)].numpy().view(np.uint16)).all()
    assert (from_bits(to_bits(finite)) == finite).all()


def test_numbers_that_are_no_bfloat16_are_not_cut(tmp_path: Path):
    with pytest.raises(AssertionError, match="bfloat16"):
        SafetensorsWriter().write(tmp_path / "s", replace(make_rows(), bfloat16=True))


def test_samples_of_bfloat16_load_as_such(tmp_path: Path):
    rows = make_rows((2, 3), "bfloat16")
    samples = {"z": rows.latents["mu"], "z_hflip": rows.latents["logvar"]}
    SafetensorsWriter().write(tmp_path / "s.safetensors", replace(rows, latents=samples))
    tensors = load_file(tmp_path / "s.safetensors")
    for name, values in samples.items():
        assert torch.equal(tensors[name], torch.from_numpy(values).bfloat16())


@pytest.mark.parametrize("name", ["mu", "valid", "key_bytes"])
def test_a_missing_tensor_is_damage(name: str, tmp_path: Path):
    SafetensorsWriter().write(tmp_path / "whole", make_rows())
    with safe_open(tmp_path / "whole", "np") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys() if key != name}  # noqa: SIM118
    save_file(tensors, tmp_path / "part")
    with pytest.raises(ValueError, match=f"part cannot be read: KeyError.*{name}"):
        SafetensorsWriter().read(tmp_path / "part")


def test_tensors_of_other_lengths_are_damage(tmp_path: Path):
    SafetensorsWriter().write(tmp_path / "whole", make_rows())
    with safe_open(tmp_path / "whole", "np") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    save_file(tensors | {"valid": tensors["valid"][1:]}, tmp_path / "part")
    with pytest.raises(ValueError, match=r"8 keys, but \[8, 8, 8, 7, 8, 8, 8\] of others"):
        SafetensorsWriter().read(tmp_path / "part")
