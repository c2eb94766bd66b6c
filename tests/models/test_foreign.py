"""Models of diffusers, LDM and FLUX read and written without `diffusers`; mistakes in words."""

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import latentmill as lm
from pipeline.__main__ import main
from pipeline.common.errors import UserError
from pipeline.export.model import export_model
from pipeline.latents import LatentDataset
from pipeline.models.autoencoder import ModelConfig, encoder_sha256
from pipeline.models.backbones.resnet import PRESETS
from pipeline.models.interchange import from_pretrained, read_description, read_weights
from pipeline.models.interchange.diffusers import read_config
from pipeline.models.interchange.importing import import_model
from pipeline.models.interchange.names import to_diffusers
from pipeline.models.interchange.writing import save_diffusers, to_config
from tests.export.world import make_config, make_data, make_run, run_export
from tests.models.foreign import MINI, WEIGHTS, as_ldm, as_old, make_model

EVERYWHERE = {**MINI, "preset": None, "widths": [32, 64], "groups": 32, "blocks": 1}
EVERYWHERE["attention"] = {"levels": [1]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model MINI as a folder of diffusers, to read only."""
    out = tmp_path_factory.mktemp("diffusers") / "vae"
    save_diffusers(out, make_model(MINI), scaling={"scaling_factor": 0.5, "shift_factor": 0.25})
    return out


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "pipeline" / "vae"))


def edit(folder: Path, **settings: Any) -> None:
    file = folder / "config.json"
    content = json.loads(file.read_text()) | settings
    file.write_text(json.dumps({k: v for k, v in content.items() if v != "absent"}))


def assert_same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("preset", PRESETS)
def test_config_json_names_every_preset_again(preset: str, tmp_path: Path):
    model = ModelConfig.model_validate(
        {
            "backbone": {"kind": "resnet", "preset": preset},
            "bottleneck": {"kind": "gaussian", "logvar": "clamp"},
            "likelihood": {"kind": "squared_error"},
        }
    )
    content = to_config(model, (3, 256, 384), {"scaling_factor": 0.18, "shift_factor": 0.1})
    (tmp_path / "config.json").write_text(json.dumps(content))
    config, version = read_config(tmp_path / "config.json")
    assert config.model() == model
    assert (config.sample_size, version) == ((256, 384), content["_diffusers_version"])
    scaling = (config.scaling_factor, config.shift_factor)
    assert scaling == ((None, None) if preset == "flux2" else (0.18, 0.1))


# As published; what is not named there has diffusers' defaults.
SD1 = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.2.2",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "out_channels": 3,
    "sample_size": 512,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
SMALL_FLUX2 = {
    "_class_name": "AutoencoderKLFlux2",
    "_name_or_path": "somewhere",
    "decoder_block_out_channels": [96, 192, 384, 384],
}


def test_published_configs_are_understood(tmp_path: Path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(SD1))
    config, _ = read_config(file)
    assert config.model().backbone.model_dump()["preset"] == "sd"
    assert (config.model().bottleneck.size, config.sample_size) == (4, 512)
    assert config.scaling_factor == 0.18215
    file.write_text(json.dumps(SMALL_FLUX2))
    backbone = read_config(file)[0].model().backbone.model_dump()
    assert backbone["preset"] == "flux2"
    assert list(backbone["decoder_widths"]) == [96, 192, 384, 384]
    assert list(backbone["widths"]) == [128, 256, 512, 512]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"_class_name": "VQModel"}, "says _class_name 'VQModel': of diffusers' models, Auto"),
        ({"act_fn": "mish"}, r"act_fn: .*mish"),
        ({"down_block_types": ["DownBlock2D"] * 3}, r"down_block_types.*DownBlock2D"),
        ({"use_post_quant_conv": False}, "use_quant_conv is True and use_post_quant_conv is Fal"),
        ({"out_channels": 1}, "in_channels is 3 and out_channels is 1"),
        ({"block_out_channels": [16, 32]}, "down_block_types has 3 entries, .* has 2"),
        ({"norm_num_groups": 12}, "groups 12 does not divide the width 16"),
        ({"latent_chanels": 4}, "latent_chanels: unknown key"),
        ({"sample_size": 33}, "33 pixels are no multiple of 4"),
        ({"sample_size": None}, "does not say which size of pictures .*give --size"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_the_model_cannot_be_is_said(copy: Path, tmp_path: Path, settings: Any, message: str):
    edit(copy, **settings)
    with pytest.raises(UserError, match=rf"(?s){message}") as raised:
        import_model(copy, tmp_path / "out")
    assert str(copy) in str(raised.value)
    assert not (tmp_path / "out").exists()


def old_names(folder: Path) -> Path:
    tensors = load_file(folder / WEIGHTS)
    renamed = as_old(tensors)
    assert renamed.keys() != tensors.keys()
    save_file(renamed, folder / WEIGHTS)
    return folder


def in_two_files(folder: Path) -> Path:
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    parts = {"a.safetensors": "encoder", "b.safetensors": ""}
    place: dict[str, str] = {}
    for file, start in parts.items():
        part = {n: t for n, t in tensors.items() if n.startswith(start) and n not in place}
        save_file(part, folder / file)
        place |= dict.fromkeys(part, file)
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": place}))
    return folder


def half_precision(folder: Path) -> Path:
    tensors = {name: value.half() for name, value in load_file(folder / WEIGHTS).items()}
    (folder / WEIGHTS).unlink()
    save_file(tensors, folder / "diffusion_pytorch_model.fp16.safetensors")
    return folder


def of_latent_diffusion(folder: Path) -> Path:
    tensors = as_ldm(load_file(folder / WEIGHTS)) | {"loss.logvar": torch.zeros(1)}
    tensors = {f"first_stage_model.{name}": value for name, value in tensors.items()}
    tensors |= {"model.diffusion_model.out.2.bias": torch.zeros(4), "alphas": torch.ones(2)}
    save_file(tensors, folder.parent / "model.safetensors")
    return folder.parent / "model.safetensors"


def of_flux(folder: Path) -> Path:
    save_file(as_ldm(load_file(folder / WEIGHTS)), folder.parent / "ae.safetensors")
    return folder.parent / "ae.safetensors"


@pytest.mark.parametrize(
    "form",
    [
        lambda folder: folder,
        lambda folder: folder / WEIGHTS,
        lambda folder: folder.parent,  # of the pipeline
        old_names,
        in_two_files,
        half_precision,
        of_latent_diffusion,
        of_flux,
    ],
    ids=["folder", "file", "pipeline", "old", "two", "half", "ldm", "flux"],
)
def test_every_form_holds_the_same_weights(copy: Path, form: Callable[[Path], Path]):
    model = make_model(MINI)
    found = read_weights(form(copy), model)
    if form is half_precision:
        assert {value.dtype for value in found.values()} == {torch.float32}
        model = model.half().float()
    assert_same(found, model.state_dict())


def test_weights_fit_another_likelihood(folder: Path, tmp_path: Path):
    """Foreign files and others' likelihoods say nothing about a model's sigma: it keeps its own."""
    model = make_model(MINI, likelihood="gaussian")
    assert "likelihood.raw_log_sigma" in model.state_dict()
    names = set(model.state_dict()) - {"likelihood.raw_log_sigma"}
    assert read_weights(folder, model).keys() == names
    import_model(folder, tmp_path / "own")
    assert read_weights(tmp_path / "own", model).keys() == names


def test_a_folder_of_this_project_holds_all(tmp_path: Path, folder: Path):
    import_model(folder, tmp_path / "own")
    assert_same(read_weights(tmp_path / "own", make_model(MINI)), make_model(MINI).state_dict())
    with pytest.raises(UserError, match="4 missing|missing"):
        read_weights(tmp_path / "own", make_model(EVERYWHERE))


def test_a_wrong_file_is_told_in_one_paragraph(folder: Path):
    with pytest.raises(UserError) as raised:
        read_weights(folder, make_model({**MINI, "widths": [16, 16, 32], "quant_convs": False}))
    text = str(raised.value)
    assert "\n" not in text
    assert len(text) < 900
    assert text.startswith(f"{folder} does not hold the weights of this model, which has 148 ")
    for part in (
        " missing (",
        ".conv_shortcut.",
        " unexpected (",
        "of another shape (",
        "encoder.down_blocks.1.resnets.0.conv1.weight [32, 16, 3, 3] instead of [16, 16, 3, 3]",
        "...",
    ):
        assert part in text, part


def as_pickle(folder: Path) -> Path:
    torch.save({"state_dict": load_file(folder / WEIGHTS)}, folder.parent / "sd.ckpt")
    return folder.parent / "sd.ckpt"


def pickle_in_folder(folder: Path) -> Path:
    torch.save(load_file(folder / WEIGHTS), folder / "diffusion_pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    return folder


def pickle_by_another_name(folder: Path) -> Path:
    return as_pickle(folder).rename(folder.parent / "sd.safetensors")


@pytest.mark.parametrize(
    "form",
    [pytest.param(as_pickle, marks=pytest.mark.slow), pickle_in_folder, pickle_by_another_name],
)
def test_a_pickle_is_not_opened_and_its_message_converts_it(
    copy: Path, form: Callable[[Path], Path], capsys: pytest.CaptureFixture[str]
):
    source = form(copy)
    out = copy.parent / "out"
    assert main(["import-model", str(source), str(out), "--size", "32"]) == 2
    message = capsys.readouterr().err
    assert "is a pickle, which can run any code when it is opened, so it is not read" in message
    assert not out.exists()
    if form is as_pickle:  # the command, as a person types it
        command = message[message.index("python -c") :].removeprefix("python")
        subprocess.run([sys.executable, *shlex.split(command)], check=True)
        found = read_weights(source.with_suffix(".safetensors"), make_model(MINI))
        assert_same(found, make_model(MINI).state_dict())


@pytest.mark.parametrize("form", [lambda folder: folder.parent, of_flux], ids=["folder", "file"])
def test_an_imported_model_is_the_projects_own(
    copy: Path, form: Callable[[Path], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    edit(copy, norm_num_groups=16)  # a file does not say: see the next lines
    source, out, wanted = form(copy), tmp_path / "out", make_model({**MINI, "groups": 16})
    if source.is_file():
        wide = make_model(EVERYWHERE, size=5)
        save_file(as_ldm(to_diffusers(wide.state_dict())), source)
        wanted = wide
    argv = ["import-model", str(source), str(out), "--size", "32x40", "--json"]
    assert main(argv) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["source"] == str(copy if source.is_dir() else source)
    assert report["event_shape"] == [3, 32, 40]
    description = read_description(out)
    assert description.model.bottleneck.model_dump()["logvar"] == "clamp"
    assert (description.step, description.dataset_id, description.weights) == (0, None, "raw")
    assert description.encoder_sha256 == encoder_sha256(wanted)
    if source.is_dir():
        assert (description.scaling_factor, description.shift_factor) == (0.5, 0.25)
    assert_same(from_pretrained(out).state_dict(), wanted.state_dict())
    model = lm.load(out)
    x = torch.rand(2, 3, 32, 40)
    codes = model.encode(x)
    assert_close = torch.testing.assert_close
    assert_close(codes.mu, wanted(x, mode="encode").posterior.mu)
    assert_close(model.decode(codes.mu), wanted.reconstruct(codes.mu))
    assert main(argv) == 2
    assert f"{out} exists already" in capsys.readouterr().err


def test_latents_of_an_imported_model_are_exported_and_verified(folder: Path, tmp_path: Path):
    import_model(folder, tmp_path / "model", size=16)
    data = make_data(tmp_path / "data", shards=2)
    config = make_config(
        tmp_path,
        tmp_path / "latents",
        run=None,
        data={"path": str(data)},
        model={"kind": "folder", "path": str(tmp_path / "model")},
    )
    run_export(config)
    with LatentDataset(tmp_path / "latents") as latents:
        assert latents.latent_shape == (4, 4, 4)
        assert latents.manifest.is_of(read_description(tmp_path / "model").encoder_sha256)
        mu = torch.from_numpy(latents[:3].mu)
    pictures = lm.load(tmp_path / "model").decode(mu)
    assert pictures.shape == (3, 3, 16, 16)


def test_the_scaling_of_an_export_or_that_there_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    data = make_data(tmp_path / "data", shards=2)
    run = make_run(tmp_path / "run", data, {"backbone": MINI})
    run_export(make_config(run, tmp_path / "latents", weights="raw"))
    argv = ["export-model", run, tmp_path / "out", "--weights", "raw", "--format", "diffusers"]
    assert main([*map(str, argv), "--latents", str(tmp_path / "latents")]) == 0
    said = capsys.readouterr().out
    assert "large log-variances differ" in said
    assert "scaling_factor" not in said
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", WEIGHTS]
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    statistics = json.loads((tmp_path / "latents" / "latent_stats.json").read_text())
    for name in ("scaling_factor", "shift_factor"):
        assert content[name] == statistics[name]
    assert content["latents_mean"] is content["latents_std"] is None
    assert (content["in_channels"], content["sample_size"]) == (1, 32)
    export_model(run, tmp_path / "again", weights="raw", format="diffusers")
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (tmp_path / "out" / WEIGHTS).read_bytes()
    argv[2] = tmp_path / "plain"
    assert main(list(map(str, argv))) == 0
    assert "scaling_factor is unknown: 1.0 stands there" in capsys.readouterr().out
    assert json.loads((tmp_path / "plain" / "config.json").read_text())["scaling_factor"] == 1.0
    argv[2] = tmp_path / "none"
    assert main([*map(str, argv), "--onnx"]) == 2
    assert "--onnx and --torch-export belong to a folder of latentmill" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({}, "classes for the backbones resnet and tiny, not for mlp"),
        ({"backbone": MINI, "bottleneck": {"kind": "deterministic"}}, "the model's is determin"),
        ({"backbone": {"kind": "tiny"}}, "backbone tiny has what bottleneck deterministic has"),
        ({"backbone": MINI, "likelihood": {"kind": "bernoulli"}}, "goes through a sigmoid first"),
        (
            {"backbone": MINI, "likelihood": {"kind": "gaussian", "link": "sigmoid"}},
            "goes through a sigmoid first",
        ),
        ({"backbone": {**MINI, "pixel_range": [0, 1]}}, r"pictures in \[-1.0, 1.0\], but .* \[0"),
        ({"backbone": {**MINI, "decoder_widths": [8, 8, 8]}}, "only its AutoencoderKLFlux2 has"),
    ],
)
def test_what_diffusers_cannot_hold_is_refused(tmp_path: Path, model: Any, message: str):
    run = make_run(tmp_path / "run", tmp_path / "data", model)
    with pytest.raises(UserError, match=f"diffusers cannot hold this model: .*{message}"):
        export_model(run, tmp_path / "out", format="diffusers")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_folder_of_diffusers_is_not_loaded_as_a_model_of_ours(folder: Path):
    with pytest.raises(UserError, match=f"latentmill import-model {folder} OUT"):
        lm.load(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{tmp}/none", "cannot be read: No such file"), ("{tmp}", "config.json cannot be read")],
)
def test_what_is_not_there_is_said(tmp_path: Path, text: str, message: str):
    with pytest.raises(UserError, match=message):
        import_model(Path(text.replace("{tmp}", str(tmp_path))), tmp_path / "out", size=32)


def test_a_file_of_something_else_is_told_by_its_names(tmp_path: Path):
    save_file({"unet.weight": torch.zeros(2)}, tmp_path / "unet.safetensors")
    message = (
        "does not hold an AutoencoderKL, .* encoder.down_blocks.0.* among its 1 tensors .unet.we"
    )
    with pytest.raises(UserError, match=message):
        import_model(tmp_path / "unet.safetensors", tmp_path / "out", size=32)
