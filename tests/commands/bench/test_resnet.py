"""A training step of `resnet-s` beside a bare loop over diffusers' AutoencoderKL, in pairs.

Same weights, pictures, loss and optimizer, one thread: what is ours are corruption keys, noise by
sample, moving average, meter and stream. The load of the machine changes for both alike.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor

from benchmarks.pictures import make_pictures
from pipeline.commands.bench.train import OurLoop
from pipeline.common import strict
from pipeline.config import TrainConfig
from pipeline.data.index import build_index
from pipeline.data.index.splits import SplitSpec
from pipeline.data.stream.datasets import open_indexes
from pipeline.distributed.runtime import Runtime
from pipeline.models.backbones import Resnet
from pipeline.models.interchange.names import to_diffusers
from pipeline.training.build import check_data, move_model

PAIRS = 7
PIXELS = 64

CONFIG = """
run_dir: {folder}/run
data:
  path: {folder}/tar
  split: all
  decode: {{kind: image, size: 64}}
  lanes: 8
model:
  backbone: {{kind: resnet, preset: resnet-s}}
  bottleneck: {{kind: gaussian, logvar: clamp}}
  likelihood: {{kind: squared_error}}
objective: {{regularisers: [{{kind: kl}}]}}
batch_size: 8
evaluation: {{split: all}}
"""


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    make_pictures(tmp_path, size=PIXELS, count=64, seed=0)
    build_index(tmp_path / "tar", split=SplitSpec(fractions={"train": 1.0}))
    return strict.load(TrainConfig, None, [], text=CONFIG.format(folder=tmp_path))


def diffusers_twin(config: TrainConfig, weights: dict[str, Tensor]) -> Any:
    """diffusers' model with our weights; Any, as its decorated methods have no types."""
    backbone = config.model.backbone
    assert isinstance(backbone, Resnet)
    levels = len(backbone.widths)
    twin: Any = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=backbone.widths,
        layers_per_block=backbone.blocks,
        latent_channels=config.model.bottleneck.size,
        norm_num_groups=backbone.groups,
        sample_size=PIXELS,
    )
    twin.load_state_dict(to_diffusers(weights))
    return twin.train()


class BareLoop:
    """A loop as written by hand, on pictures in memory."""

    def __init__(self, config: TrainConfig, weights: dict[str, Tensor], x: list[Tensor]) -> None:
        self._config, self._pictures = config, x
        self._model = move_model(diffusers_twin(config, weights), config, torch.device("cpu"))
        self._optimizer = config.optimizer.build(self._model)
        self._step = 0

    def encode(self, x: Tensor) -> Tensor:
        """The posterior's mean."""
        return self._model.encode(x * 2 - 1).latent_dist.mean

    def run(self) -> None:
        """Train one step."""
        x = self._pictures[self._step % len(self._pictures)]
        posterior = self._model.encode(x * 2 - 1).latent_dist
        decoded = (self._model.decode(posterior.sample()).sample + 1) / 2
        loss = ((decoded - x).square().sum(dim=(1, 2, 3)) + posterior.kl()).mean()
        loss.backward()
        norm = self._config.optimizer.max_grad_norm
        if norm is not None:
            torch.nn.utils.clip_grad_norm_(self._model.parameters(), norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._step += 1


def seconds_of(step: Callable[[], object]) -> float:
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


@pytest.mark.alone
@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_a_step_of_resnet_s_keeps_up_with_a_bare_loop_over_diffusers(config: TrainConfig):
    runtime = Runtime.start(accumulation=1)
    indexes = open_indexes(config.data)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    ours = OurLoop(config, indexes, check_data(config, indexes), runtime)
    try:
        weights = {name: t.clone() for name, t in ours.strategy.model.state_dict().items()}
        unwrapped = {name.removeprefix("module."): value for name, value in weights.items()}
        decode = config.data.decode
        pictures = [
            decode.to_unit(batch.x).clone(memory_format=torch.preserve_format)
            for batch in ours.preload()
        ]
        bare = BareLoop(config, unwrapped, pictures)
        with torch.no_grad():
            mine = ours.strategy.model(pictures[0], mode="encode").posterior.mu
            torch.testing.assert_close(bare.encode(pictures[0]), mine, atol=1e-4, rtol=0)
        pairs: list[tuple[float, float]] = []
        for number in range(PAIRS + 1):
            steps: list[Callable[[], object]] = [lambda: ours.run(1), bare.run]
            order = (0, 1) if number % 2 else (1, 0)
            took = {which: seconds_of(steps[which]) for which in order}
            if number:  # the first warms up
                pairs.append((took[0], took[1]))
    finally:
        ours.stream.close()
        torch.set_num_threads(threads)
    ratios = [theirs / mine for mine, theirs in pairs]
    figures = {
        "ours, s/step": round(median(mine for mine, _ in pairs), 3),
        "diffusers, s/step": round(median(theirs for _, theirs in pairs), 3),
        "ratios of the rates": [round(ratio, 3) for ratio in ratios],
        "median": round(median(ratios), 3),
    }
    print(json.dumps(figures))
    assert median(ratios) >= 0.95
