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

from pipeline.common.errors import UserError
from pipeline.latents.files import reported_as_damage
from pipeline.latents.formats.safetensors.reader import read_header
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


DAMAGED_HEADERS = {
    "a list": "[]",
    "null": "null",
    "deep": "[" * 100_000,
    "no mapping of a tensor": '{"mu": [0, 4]}',
    "a gap": '{"mu": {"dtype": "U8", "shape": [3], "data_offsets": [1, 4]}}',
    "before the file": '{"mu": {"dtype": "U8", "shape": [8], "data_offsets": [-4, 4]}}',
    "too short for its shape": '{"mu": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
    "beyond the file": '{"mu": {"dtype": "U8", "shape": [9], "data_offsets": [0, 9]}}',
    "bytes behind it": '{"mu": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]}}',
    "an unknown type": '{"mu": {"dtype": "X9", "shape": [4], "data_offsets": [0, 4]}}',
    "offsets of no number": '{"mu": {"dtype": "U8", "shape": [4], "data_offsets": ["0", "4"]}}',
}


@pytest.mark.parametrize("header", DAMAGED_HEADERS.values(), ids=DAMAGED_HEADERS)
def test_a_damaged_header_is_damage_to_both_who_read_it(header: str, tmp_path: Path):
    data = len(header).to_bytes(8, "little") + header.encode() + bytes(4)
    path = tmp_path / "s.safetensors"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"s\.safetensors cannot be read"):
        SafetensorsWriter().read(path)
    with (
        pytest.raises(UserError, match=f"^{path} cannot be read"),
        reported_as_damage(str(path)),
    ):
        read_header(lambda offset, size: data[offset : offset + size], len(data))


def test_a_header_longer_than_the_file_is_damage(tmp_path: Path):
    (tmp_path / "s").write_bytes((1 << 62).to_bytes(8, "little") + b"{}")
    with pytest.raises(ValueError, match="ends within its header"):
        SafetensorsWriter().read(tmp_path / "s")
