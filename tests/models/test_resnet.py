"""The `resnet` backbone: numbers of parameters, its layers, its digest, and wrong settings.

That it computes what diffusers does: test_diffusers.py.
"""

import json
from typing import Any, get_args

import pytest
import torch
from torch.nn import functional

from pipeline.common import strict
from pipeline.common.errors import UserError
from pipeline.models.autoencoder import (
    AutoEncoder,
    ModelConfig,
    build_autoencoder,
    encoder_sha256,
    num_parameters,
)
from pipeline.models.backbones import Resnet
from pipeline.models.backbones.resnet import LATENT_CHANNELS, PRESETS, Preset
from pipeline.models.backbones.resnet_layers import QUERIES, Attention, GroupNorm, attend, doubled

F16 = [128, 128, 256, 256, 512]
# Encoder, decoder, and the whole with its quant convolutions, as diffusers' classes have them.
COUNTS: dict[str, tuple[dict[str, Any], int, int, int]] = {
    "sd": ({}, 34_163_592, 49_490_179, 83_653_863),
    "flux": ({}, 34_274_208, 49_545_475, 83_819_683),
    "flux2": ({}, 34_421_696, 49_619_203, 84_046_115),
    "ldm-f4": ({}, 22_351_238, 32_960_771, 55_312_063),
    "ldm-f16": ({}, 28_265_760, 41_343_875, 69_610_963),
    "mar-kl16": ({}, 28_265_760, 38_188_931, 66_456_019),
    "va-vae": ({}, 28_413_248, 41_417_603, 69_836_067),
    "resnet-s": ({}, 8_613_344, 12_415_107, 21_029_779),
    "resnet-xs": ({}, 1_463_976, 2_420_227, 3_884_295),
    "resnet-mini": ({}, 93_784, 148_451, 242_327),
    # Others that are in use: a preset and some settings, or settings alone.
    "flux with quant convs": (
        {"preset": "flux", "quant_convs": True},
        *(34_274_208, 49_545_475, 83_821_011),
    ),
    "flux2, small decoder": (
        {"preset": "flux2", "decoder_widths": [96, 192, 384, 384]},
        *(34_421_696, 27_946_179, 62_373_091),
    ),
    "f16 without attention by level": (
        {"preset": "mar-kl16", "attention": {"levels": []}},
        *(26_162_464, 38_188_931, 64_352_723),
    ),
    "ldm-f32": (
        {"widths": [*F16, 512], "attention": {"levels": [4, 5]}, "size": 64},
        *(42_614_656, 61_244_803, 103_880_131),
    ),
    "ostris f8d16": (
        {"widths": [128, 128, 256, 512], "size": 16},
        *(23_210_016, 34_055_299, 57_266_643),
    ),
    "glm-image": (
        {"preset": "flux", "widths": [128, 512, 1024, 1024], "blocks": 3}
        | {"attention": {"mid": False}},
        *(172_443_808, 233_656_835, 406_100_643),
    ),
    "diffusers' defaults": ({"widths": [64], "blocks": 1, "size": 4}, 245_640, 317_443, 563_175),
}
SMALL = {"kind": "resnet", "widths": [8, 16], "blocks": 1, "groups": 4}


def load(backbone: dict[str, Any], **other: Any) -> ModelConfig:
    """Read a model's settings as a config file has them."""
    text = json.dumps({"backbone": {"kind": "resnet", **backbone}, **other})
    return strict.load(ModelConfig, None, [], text=text)


def build(backbone: dict[str, Any], shape: tuple[int, ...] = (3, 16, 24)) -> AutoEncoder:
    config = load(backbone, bottleneck={"kind": "gaussian", "size": 4})
    return build_autoencoder(config, shape, seed=0, dtype=torch.float32)


@pytest.mark.parametrize("name", COUNTS)
def test_published_numbers_of_parameters(name: str) -> None:
    settings, encoder, decoder, total = COUNTS[name]
    backbone = {"preset": name, **settings} if name in PRESETS else dict(settings)
    size = backbone.pop("size", None)
    other = {} if size is None else {"bottleneck": {"kind": "gaussian", "size": size}}
    config = load(backbone, **other)
    with torch.device("meta"):
        model = AutoEncoder(config, (3, 256, 256))
    quant = (model.encoder.quant_conv, model.decoder.post_quant_conv)
    halves = [num_parameters(half) for half in (model.encoder, model.decoder)]
    assert sum(halves) == total
    assert [n - num_parameters(q) for n, q in zip(halves, quant, strict=True)] == [encoder, decoder]
    assert model.latent_shape[0] == config.bottleneck.size


def test_the_smallest_preset_with_one_channel() -> None:
    model = build({"preset": "resnet-mini"}, (1, 32, 32))
    assert num_parameters(model.encoder) + num_parameters(model.decoder) == 241_749


def test_every_preset_has_counts_and_latent_channels() -> None:
    assert set(get_args(Preset)) == set(PRESETS) == set(LATENT_CHANNELS) == set(PRESETS) & {*COUNTS}


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_spelled_out_is_the_same(preset: str) -> None:
    config = load({"preset": preset})
    assert strict.load(ModelConfig, None, [], text=strict.dump(config)) == config
    spelled_out = json.loads(config.model_dump_json())
    del spelled_out["backbone"]["preset"]
    again = ModelConfig.model_validate(spelled_out)
    assert again.backbone.model_copy(update={"preset": preset}) == config.backbone
    assert again.bottleneck == config.bottleneck
    assert again.backbone.encoder_settings() == config.backbone.encoder_settings()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("widths", [32, 64, 64, 64, 64]),
        ("decoder_widths", [32, 32, 32, 32, 64]),
        ("blocks", 3),
        ("attention", {"levels": [3, 4], "decoder_levels": None, "mid": True}),
        ("attention", {"levels": [4], "decoder_levels": [], "mid": False}),
        ("groups", 16),
        ("quant_convs", False),
        ("pixel_range", [0.0, 1.0]),
    ],
)
def test_each_field_of_a_preset_can_be_replaced(name: str, value: Any) -> None:
    given = {k: v for k, v in value.items() if v is not None} if name == "attention" else value
    before, config = load({"preset": "ldm-f16"}), load({"preset": "ldm-f16", name: given})
    expected = {**before.model_dump(mode="json")["backbone"], name: value}
    assert config.model_dump(mode="json")["backbone"] == expected
    assert strict.load(ModelConfig, None, [], text=strict.dump(config)) == config
    small = load({"preset": "ldm-f16"}, bottleneck={"kind": "gaussian", "size": 5})
    assert (config.bottleneck.size, small.bottleneck.size) == (16, 5)


def test_the_digest_of_an_encoder_does_not_know_the_decoder() -> None:
    encoder = {"preset": "resnet-mini", "widths": [8, 16, 16]}
    digest = encoder_sha256(build(encoder))
    for decoder in (
        {"decoder_widths": [16, 24, 8]},
        {"decoder_widths": [8, 16, 16]},
        {"attention": {"decoder_levels": [0]}},
        {"attention": {"levels": [], "decoder_levels": []}},
    ):
        assert encoder_sha256(build(encoder | decoder)) == digest
    spelled_out = {"widths": [8, 16, 16], "blocks": 1, "groups": 8}
    assert encoder_sha256(build(spelled_out)) == digest
    for other in (
        {"pixel_range": [0, 1]},
        {"attention": {"levels": [1]}},
        {"attention": {"mid": False}},
        {"groups": 2},
        {"quant_convs": False},
    ):
        assert encoder_sha256(build(encoder | other)) != digest


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "backbone: needs a preset (sd, flux, flux2, ldm-f4, ldm-f16, mar-kl16, va-vae, "),
        ({"preset": "sdxl"}, "did you mean 'sd'?"),
        (
            {"widths": [32, 48]},
            "groups 32 does not divide the width 48: take multiples of 32 as widths, or set "
            "groups to one of 1, 2, 4, 8, 16",
        ),
        (
            SMALL | {"decoder_widths": [8, 18]},
            "groups 4 does not divide the width 18: take multiples of 4 as widths, or set groups "
            "to one of 1, 2",
        ),
        (SMALL | {"decoder_widths": [8]}, "decoder_widths has 1 levels, but widths has 2"),
        (
            SMALL | {"attention": {"levels": [2]}},
            "attention.levels names level 2, but the levels are 0 to 1",
        ),
        (
            SMALL | {"attention": {"decoder_levels": [7]}},
            "attention.decoder_levels names level 7, but the levels are 0 to 1",
        ),
        (
            SMALL | {"pixel_range": [1, -1]},
            "pixel_range must be [lowest, highest], but is [1.0, -1.0]",
        ),
        (SMALL | {"widths": []}, "backbone.widths: "),
        (SMALL | {"widths": [8, 0]}, "backbone.widths.1: must be greater than 0"),
    ],
)
def test_wrong_settings_are_refused_in_words(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as raised:
        load(settings)
    assert message in str(raised.value)
    if "groups to one of" in message:  # no number more
        assert str(raised.value).endswith(message)
    assert len(str(raised.value).splitlines()) == 2, raised.value  # one problem, said once


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 100, 64), r"halves pictures 3 times, but 100 pixels .* of 8: .* \[96, 64\] or \[104"),
        ((3, 100, 30), r"100 and 30 pixels are no multiple of 8: .* \[96, 24\] or \[104, 32\]"),
        ((1, 4, 8), r"but 4 pixels are no multiple of 8: set data.decode.size to \[8, 8\]$"),
        ((100,), r"takes pictures \[C, H, W\], not \[100\]"),
    ],
)
def test_pictures_that_do_not_fit_are_refused_with_the_nearest(
    shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Resnet(preset="sd").check_event(shape)


def test_doubling_is_nearest_upsampling_bit_for_bit() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, 7, requires_grad=True)
    for given in (x, x.to(memory_format=torch.channels_last)):
        found, wanted = doubled(given), functional.interpolate(given, scale_factor=2.0)
        assert torch.equal(found, wanted)
        by = torch.randn_like(wanted)
        for one, other in zip(
            torch.autograd.grad(found, x, by), torch.autograd.grad(wanted, x, by), strict=True
        ):
            torch.testing.assert_close(one, other)


def test_attention_in_chunks_is_attention() -> None:
    torch.manual_seed(0)
    layer = Attention(8, groups=4).double()
    x = torch.randn(2, 8, 33, 35, dtype=torch.float64, requires_grad=True)
    assert QUERIES < 33 * 35
    tokens = layer.group_norm(x).flatten(2).transpose(1, 2)
    whole = attend(layer.to_q(tokens), layer.to_k(tokens), layer.to_v(tokens))
    wanted = x + layer.to_out[0](whole).transpose(1, 2).reshape(x.shape)
    by_torch = functional.scaled_dot_product_attention(
        layer.to_q(tokens), layer.to_k(tokens), layer.to_v(tokens)
    )
    torch.testing.assert_close(whole, by_torch, rtol=0, atol=1e-12)
    found, by = layer(x), torch.randn_like(x)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    sources = [x, *layer.parameters()]
    for one, other in zip(
        torch.autograd.grad(found, sources, by),
        torch.autograd.grad(wanted, sources, by),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_normalisation_and_softmax_are_in_float32_under_autocast() -> None:
    torch.manual_seed(0)
    norm = GroupNorm(4, 8)
    x = (3 + torch.randn(2, 8, 6, 6)).bfloat16()
    q, k, v = (4 * torch.randn(2, 36, 8).bfloat16() for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        normalised, attended = norm(x), attend(q, k, v)
    assert normalised.dtype == attended.dtype == torch.bfloat16
    exact = functional.group_norm(x.float(), 4, norm.weight, norm.bias, norm.eps)
    assert torch.equal(normalised, exact.bfloat16())
    scores = (q @ k.transpose(1, 2) * 8**-0.5).float()
    assert torch.equal(attended, scores.softmax(-1).bfloat16() @ v)
