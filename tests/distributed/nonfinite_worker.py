"""`pipeline.train` with gradients that are spoilt on one rank in chosen steps.

    in_turn.py strike OUT STRIKES CONFIG [a.b=c ...]

STRIKES: JSON, a list of [step, rank, where, factor]; where: "output" spoils what flows back into
the network from the loss, a number the gradient of the parameter of that index alone. OUT-RANK.json
becomes a list: per step a digest of the parameters that this rank holds when the step begins.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pipeline.common import strict
from pipeline.config import TrainConfig
from pipeline.models.autoencoder import AutoEncoder, ModelOutput
from pipeline.train import main as train

RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


class Strike(NamedTuple):
    """Multiply a gradient of one rank in one step; with accumulation in one micro-batch of it."""

    step: int
    rank: int  # modulo the number of processes
    where: str | int
    factor: float


class Saboteur:
    """A forward hook of every module that counts training steps, and strikes in some."""

    def __init__(self, strikes: list[Strike], accumulation: int) -> None:
        self.digests: list[str] = []
        self._strikes = strikes
        self._accumulation = accumulation
        self._calls = -1  # the throw-away forward is no step

    def __call__(self, module: nn.Module, args: tuple[object, ...], output: object) -> None:
        """Look at the whole model's forward passes only, and not at those of evaluations."""
        del args
        if not isinstance(module, AutoEncoder) or not torch.is_grad_enabled():
            return
        assert isinstance(output, ModelOutput)
        step, part = divmod(self._calls, self._accumulation)
        self._calls += 1
        if step >= 0 and part == 0:
            self.digests.append(digest(module))
        for strike in self._strikes:
            here = (strike.step, strike.step % self._accumulation, strike.rank % WORLD)
            if here == (step, part, RANK):
                assert output.decoded is not None
                whole = strike.where == "output"
                target = output.decoded if whole else list(module.parameters())[int(strike.where)]
                spoil_once(target, strike.factor)


def spoil_once(value: Tensor, factor: float) -> None:
    """Multiply the gradient of `value` in the next backward."""

    def spoil(gradient: Tensor) -> Tensor:
        handle.remove()
        return gradient * factor

    handle = value.register_hook(spoil)


def digest(module: nn.Module) -> str:
    """Of the parameters, or of this rank's shards of them under ZeRO-3."""
    held = [getattr(p, "ds_tensor", p).detach().contiguous() for p in module.parameters()]
    return hashlib.sha256(b"".join(value.numpy().tobytes() for value in held)).hexdigest()


def main(out: str, strikes: str, config: str, *overrides: str) -> int:
    accumulation = strict.load(TrainConfig, Path(config), overrides).accumulation
    saboteur = Saboteur([Strike(*strike) for strike in json.loads(strikes)], accumulation)
    with torch.nn.modules.module.register_module_forward_hook(saboteur):
        code = train([config, *overrides])
    Path(f"{out}-{RANK}.json").write_text(json.dumps(saboteur.digests))
    return code
