"""Encoder and decoder as ONNX and torch.export programs compute what the pipeline computes."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

from pipeline.__main__ import main
from pipeline.common.errors import UserError
from pipeline.models.autoencoder import AutoEncoder
from pipeline.models.backbones import Backbone
from pipeline.models.bottlenecks import Bottleneck
from pipeline.models.interchange import from_pretrained, read_description
from pipeline.models.likelihoods import Likelihood
from pipeline.models.portable import check_outputs
from pipeline.training.loading import load_run
from tests.models.exported import (
    CASES,
    COLOUR,
    FREE,
    SLOW,
    TOLERANCE,
    assert_close,
    export,
    leave_run,
    stored_values,
)
from tests.processes import ROOT
from tests.shards import tiny_image

EXAMPLE = ROOT / "examples" / "embed_onnx.py"


@pytest.fixture(scope="module")
def colour_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return leave_run(tmp_path_factory.mktemp("colour") / "run", CASES["colour"])


@pytest.fixture(scope="module")
def colour(colour_run: Path) -> Path:
    """An exported model to read only."""
    return export(colour_run, colour_run.with_name("model"), onnx=True, torch_export=True)


def test_every_kind_of_network_has_a_case():
    for place, union in ((1, Backbone), (2, Bottleneck), (3, Likelihood)):
        kinds = {kind.model_fields["kind"].default for kind in get_args(get_args(union)[0])}
        assert {case[place]["kind"] for case in CASES.values()} == kinds


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["colour", "float32", *SLOW, pytest.param("maps", marks=pytest.mark.soak)]
)
def test_programs_compute_what_the_model_computes(
    name: str, colour_run: Path, colour: Path, tmp_path: Path
):
    run, out = colour_run, colour
    if name != "colour":
        run = leave_run(tmp_path / "run", CASES[name])
        out = export(run, tmp_path / "out", onnx=True, torch_export=True)
    decode, model = load_run(run, weights="raw").config.data.decode, from_pretrained(out)
    dtype = next(model.parameters()).dtype
    session = onnxruntime.InferenceSession(out / "encoder.onnx")
    program = torch.export.load(out / "encoder.pt2").module()
    from_z = onnxruntime.InferenceSession(out / "decoder.onnx")
    program_from_z = torch.export.load(out / "decoder.pt2").module()
    for count in (1, 5):
        x = stored_values(CASES[name][0], tuple(decode.buffer_shape), count)
        unit = decode.to_unit(decode.event_view(torch.from_numpy(x))).to(dtype)
        posterior = model(unit, mode="encode").posterior
        statistics = {"mu": posterior.mu}
        if posterior.logvar is not None:
            statistics["logvar"] = posterior.logvar
        of_program = program(torch.from_numpy(x))
        assert list(of_program) == [o.name for o in session.get_outputs()] == list(statistics)
        for field, wanted in statistics.items():
            assert_close(session.run([field], {"x": x})[0], wanted)
            assert_close(of_program[field].detach().numpy(), wanted)
        z = torch.randn(count, *model.latent_shape, generator=torch.manual_seed(count))
        decoded = model(z.to(dtype), mode="decode").decoded
        wanted = model.config.likelihood.mean(decoded).clamp(0, 1)
        assert_close(from_z.run(["reconstruction"], {"z": z.numpy()})[0], wanted)
        assert_close(program_from_z(z)["reconstruction"].detach().numpy(), wanted)
    if name in FREE:
        _check_other_sizes(name, (session, from_z), (program, program_from_z), model, decode)


def _check_other_sizes(
    name: str, sessions: tuple[Any, Any], programs: tuple[Any, Any], model: AutoEncoder, decode: Any
) -> None:
    multiple, height_axis = FREE[name]
    for session, at in zip(sessions, (height_axis, 2), strict=True):
        assert session.get_inputs()[0].shape[at : at + 2] == ["height", "width"]
    shape = [3, *decode.buffer_shape]
    for height, width in ((2, 7), (6, 2)):  # of latents
        shape[height_axis : height_axis + 2] = height * multiple, width * multiple
        x = stored_values(CASES[name][0], tuple(shape[1:]), 3)
        unit = decode.to_unit(decode.event_view(torch.from_numpy(x)))
        mu = model(unit, mode="encode").posterior.mu
        assert mu.shape[2:] == (height, width)
        assert_close(sessions[0].run(["mu"], {"x": x})[0], mu)
        assert_close(programs[0](torch.from_numpy(x))["mu"].detach().numpy(), mu)
        wanted = model.reconstruct(mu)
        assert_close(sessions[1].run(None, {"z": mu.detach().numpy()})[0], wanted)
        assert_close(programs[1](mu.detach())["reconstruction"].detach().numpy(), wanted)


def test_the_description_says_what_goes_in_and_comes_out(colour: Path):
    networks = json.loads((colour / "config.json").read_text())["networks"]
    latent = {"dtype": "float32", "shape": [2]}
    assert networks["encoder"]["inputs"] == [{"name": "x", "dtype": "uint8", "shape": [32, 32, 3]}]
    assert networks["encoder"]["outputs"] == [{"name": "mu"} | latent, {"name": "logvar"} | latent]
    assert networks["decoder"]["inputs"] == [{"name": "z"} | latent]
    event = {"name": "reconstruction", "dtype": "float32", "shape": [3, 32, 32]}
    assert networks["decoder"]["outputs"] == [event]
    for name, network in networks.items():
        assert set(network["files"]) == {f"{name}.onnx", f"{name}.pt2"}
        for file, digest in network["files"].items():
            assert hashlib.sha256((colour / file).read_bytes()).hexdigest() == digest
        session = onnxruntime.InferenceSession(colour / f"{name}.onnx")
        found = [*session.get_inputs(), *session.get_outputs()]
        told = [*network["inputs"], *network["outputs"]]
        assert [(tensor.name, tensor.shape) for tensor in found] == [
            (tensor["name"], ["batch", *tensor["shape"]]) for tensor in told
        ]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.slow
def test_the_same_bytes_again_in_another_process_and_no_place(
    colour_run: Path, colour: Path, tmp_path: Path
):
    moved = tmp_path / "moved"
    shutil.copytree(colour_run, moved)
    out = tmp_path / "again"
    argv = ["export-model", moved, out, "--weights", "raw", "--onnx", "--torch-export", "--json"]
    command = [sys.executable, "-m", "pipeline", *map(str, argv)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert set(json.loads(ended.stdout)["files"]) == set(contents(out))
    assert contents(out) == contents(colour)
    for place in (str(ROOT), str(colour_run.parent), sys.prefix, str(Path(torch.__file__).parent)):
        for name, data in contents(colour).items():
            assert place.encode() not in data, name


def test_formats_are_written_on_request_only(colour_run: Path, colour: Path, tmp_path: Path):
    plain = {"config.json", "model.safetensors"}
    assert set(contents(export(colour_run, tmp_path / "none"))) == plain
    assert "networks" not in json.loads((tmp_path / "none" / "config.json").read_text())
    assert read_description(tmp_path / "none").networks is None
    out = export(colour_run, tmp_path / "pt2", torch_export=True)
    assert set(contents(out)) == {*plain, "encoder.pt2", "decoder.pt2"}
    assert (out / "encoder.pt2").read_bytes() == (colour / "encoder.pt2").read_bytes()
    assert contents(out)["model.safetensors"] == contents(tmp_path / "none")["model.safetensors"]


@pytest.mark.parametrize("format_", ["onnx", "torch_export"])
def test_a_program_that_differs_is_not_published(format_: str, tmp_path: Path):
    run = leave_run(tmp_path / "run", CASES["float32"], scale=float("nan"))
    with pytest.raises(UserError, match=r"(?s)encoder\..* differ by more .*Nothing was exported"):
        export(run, tmp_path / "out", **{format_: True})
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    export(run, tmp_path / "out")  # the weights alone can be had


def test_outputs_beyond_the_tolerance_do_not_pass():
    wanted = {"mu": np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)}
    check_outputs("encoder.onnx", wanted, wanted)
    for row, factor in ((2, 2), (4, -2)):
        off = factor * TOLERANCE * (1 + np.abs(wanted["mu"])) * (np.arange(5) == row)[:, None]
        check_outputs("encoder.onnx", {"mu": wanted["mu"] + off / 4}, wanted)
        with pytest.raises(UserError, match=rf"3 of 15 values of mu .* of 5; .*\(row {row}\)"):
            check_outputs("encoder.onnx", {"mu": wanted["mu"] + off}, wanted)


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named_before_anything_is_read(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    monkeypatch.setitem(sys.modules, package, None)  # how Python marks what cannot be imported
    assert main(["export-model", str(tmp_path / "no-run"), str(tmp_path / "out"), "--onnx"]) == 2
    message = capsys.readouterr().err
    assert re.match(rf"error: --onnx needs {package}, which is not installed: `pip", message)
    assert "pip install 'latentmill[onnx]'" in message
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_is_taken_stays_as_it_is(colour_run: Path, colour: Path):
    before = contents(colour)
    with pytest.raises(UserError, match="exists already"):
        export(colour_run, colour, onnx=True)
    assert contents(colour) == before
    assert {path.name for path in colour.parent.iterdir()} == {"run", "model"}


def write_images(folder: Path) -> dict[str, Path]:
    """Files of every sort: of the model's size, other sizes, turned, translucent, grey, 16 bit."""
    exif = Image.Exif()
    exif[0x0112] = 6
    tall = np.concatenate([tiny_image(3, 40), tiny_image(4, 40)])
    alpha = np.full((32, 32, 1), 100, np.uint8)
    deep = np.arange(32 * 32, dtype=np.uint16).reshape(32, 32) * 60
    images = {
        "same.png": (tiny_image(1), {}),
        "same.jpg": (tiny_image(2), {"quality": 90}),
        "tall.png": (tall, {}),
        "small.png": (tiny_image(5, 20), {}),
        "turned.png": (tall, {"exif": exif}),
        "clear.png": (np.concatenate([tiny_image(6), alpha], axis=2), {}),
        "grey.png": (tiny_image(7)[:, :, 0], {}),
        "deep.png": (deep, {}),
        "lossless.webp": (tiny_image(8), {"lossless": True}),
    }
    for name, (pixels, options) in images.items():
        Image.fromarray(pixels).save(folder / name, **options)
    return {name: folder / name for name in images}


@pytest.mark.parametrize("channels", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_the_example_finds_the_pipelines_latents(
    channels: int, colour_run: Path, colour: Path, tmp_path: Path
):
    run, model = colour_run, colour
    if channels == 1:
        case = (COLOUR | {"channels": 1, "background": 200}, *CASES["colour"][1:])
        run = leave_run(tmp_path / "run", case)
        model = export(run, tmp_path / "model", onnx=True)
    files = write_images(tmp_path)
    command = [sys.executable, "-I", EXAMPLE, model, *files.values(), "--out", "latents.npy"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
    found = np.load(tmp_path / "latents.npy")
    decode = load_run(run, weights="raw").config.data.decode
    x = np.zeros((len(files), *decode.buffer_shape), np.uint8)
    for slot, file in zip(x, files.values(), strict=True):
        decode.decode(file.read_bytes(), slot)
    assert len(np.unique(x.reshape(len(x), -1), axis=0)) == len(files)
    unit = decode.to_unit(decode.event_view(torch.from_numpy(x)))
    assert_close(found, from_pretrained(model)(unit, mode="encode").posterior.mu)


def test_the_example_needs_nothing_of_the_package_and_refuses_arrays(tmp_path: Path):
    assert "import torch" not in EXAMPLE.read_text()
    assert not re.search(r"(import|from) (pipeline|launch)", EXAMPLE.read_text())
    model = export(leave_run(tmp_path / "run", CASES["float32"]), tmp_path / "model")
    command = [
        sys.executable,
        EXAMPLE,
        model,
        tmp_path / "a.png",
        "--out",
        tmp_path / "latents.npy",
    ]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 1
    assert "takes arrays, not image files" in ended.stderr
