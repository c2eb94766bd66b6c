"""What `pipeline.models.cost` counts without memory is what real tensors take."""

from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from pipeline.common.precision import autocast, parameter_dtype
from pipeline.models.autoencoder import (
    AutoEncoder,
    ModelConfig,
    build_autoencoder,
    num_parameters,
    stages_of,
)
from pipeline.models.cost import model_cost
from tests.activations import kept_bytes

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
MINI = {"kind": "resnet", "preset": "resnet-mini"}
CASES = [
    ({"kind": "burgess"}, (3, 64, 64)),
    ({"kind": "mlp", "hidden": [64] * 5}, (8, 8)),
    (MINI, (3, 32, 24)),
]


def measured(model: AutoEncoder, num_images: int, precision: str) -> int:
    """Bytes that a real forward pass keeps."""
    x = torch.rand(num_images, *model.event_shape, dtype=parameter_dtype(precision))

    def forward() -> object:
        with autocast(precision, CPU):
            output = model(x, keys=torch.arange(num_images))
            return model.config.likelihood.nll(output.decoded, x, output.learned)

    return kept_bytes(forward, besides=model.parameters())


def largest_stage(model: AutoEncoder, num_images: int, precision: str) -> int:
    """Bytes that the largest stage keeps besides its input."""
    dtype, largest = parameter_dtype(precision), 0
    shapes = ((model.encoder, model.event_shape), (model.decoder, model.latent_shape))
    for network, shape in shapes:
        x = torch.rand(num_images, *shape, dtype=dtype)
        for stage in stages_of(network):

            def forward(x: torch.Tensor = x, stage: Any = stage) -> torch.Tensor:
                with autocast(precision, CPU):
                    for layer in stage:
                        x = layer(x)
                return x

            largest = max(largest, kept_bytes(forward, besides=(x, *model.parameters())))
            x = forward().detach()
    return largest


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64"])
@pytest.mark.parametrize(("backbone", "shape"), CASES, ids=("burgess", "mlp", "resnet"))
def test_activations_are_those_of_a_real_pass(
    backbone: dict[str, Any], shape: tuple[int, ...], precision: str
):
    config = ModelConfig.model_validate({"backbone": backbone})
    dtype = parameter_dtype(precision)
    model = build_autoencoder(config, shape, seed=0, dtype=dtype)
    cost = model_cost(config, shape, precision)
    assert cost.parameters == num_parameters(model)
    assert cost.latent_shape == model.latent_shape
    saving = config.model_copy(update={"gradient_checkpointing": True})
    staged = build_autoencoder(saving, shape, seed=0, dtype=dtype)
    for num_images in (20, 28):
        assert cost.plain.of(num_images) == pytest.approx(
            measured(model, num_images, precision), rel=0.02
        )
        expected = measured(staged, num_images, precision)
        expected += largest_stage(model, num_images, precision)
        # Which stage is the largest may depend on the batch, where weights outweigh images.
        assert cost.checkpointed.of(num_images) == pytest.approx(expected, rel=0.02, abs=10_000)


def test_operations_are_those_of_the_literature():
    """autoencoders of Stable Diffusion at 256 pixels: 136 and 311 billion multiply-adds."""
    config = ModelConfig.model_validate({"backbone": {"kind": "resnet", "preset": "sd"}})
    cost = model_cost(config, (3, 256, 256), "fp32")
    assert cost.encoder.flops / 2e9 == pytest.approx(136.4, abs=0.05)
    assert cost.decoder.flops / 2e9 == pytest.approx(311.1, abs=0.05)
    assert (cost.latent_shape, cost.latent_ratio) == ((4, 32, 32), 48)
    # 2.1 GiB for each picture: 144 MiB at 64 pixels were measured on diffusers' class.
    assert cost.plain.per_image == pytest.approx(16 * 144 * 2**20, rel=0.06)
    assert cost.checkpointed.per_image < 0.33 * cost.plain.per_image


def test_a_frozen_encoder_keeps_nothing():
    shape = (3, 32, 24)
    config = ModelConfig.model_validate({"backbone": MINI})
    model = build_autoencoder(config, shape, seed=0, dtype=torch.float32)
    model.encoder.requires_grad_(False)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    cost, whole = model_cost(config, shape, "fp32", frozen), model_cost(config, shape, "fp32")
    assert cost.trained == whole.parameters - num_parameters(model.encoder)
    assert cost.plain.of(20) == pytest.approx(measured(model, 20, "fp32"), rel=0.02)
    assert cost.plain.of(20) < 0.8 * whole.plain.of(20)
    assert cost.checkpointed.of(20) < 0.9 * whole.checkpointed.of(20)


def test_checkpointing_neither_keeps_nor_repeats_a_frozen_encoder():
    config = ModelConfig.model_validate({"backbone": MINI, "gradient_checkpointing": True})
    model = build_autoencoder(config, (3, 32, 24), seed=0, dtype=torch.float32)
    model.encoder.requires_grad_(False)
    inputs: dict[str, list[StorageWeakRef]] = {"encoder": [], "decoder": []}
    for name, seen in inputs.items():

        def note(_: object, x: tuple[torch.Tensor], seen: list[StorageWeakRef] = seen) -> None:
            seen.append(StorageWeakRef(x[0].untyped_storage()))

        model.get_submodule(f"{name}.mid_block.resnets.0").register_forward_pre_hook(note)
    output = model(torch.rand(20, 3, 32, 24), keys=torch.arange(20))
    assert [inputs[name][0].expired() for name in inputs] == [True, False]
    output.decoded.sum().backward()
    assert list(map(len, inputs.values())) == [1, 2]
