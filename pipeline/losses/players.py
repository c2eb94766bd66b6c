"""The autoencoder and the discriminator that it plays against, as one trained module.

    corrupted -> autoencoder -> mean y -> discriminator -> the generator's loss -> its gradient at y
    clean, y without its graph -> discriminator -> judgements

Both players share one engine and one backward pass. The generator's loss enters the total as
sum(y * gradient), whose gradient at y is that of the generator; the discriminator's parameters get
the gradient of their own loss only. This equals one update of each player from the same weights,
under DDP and every stage of ZeRO, where two backward passes through one engine fail.
"""

from collections.abc import Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor, nn

from pipeline.common.errors import UserError
from pipeline.common.precision import widen
from pipeline.losses.terms import AdversarialTerm, Game
from pipeline.models.autoencoder import AutoEncoder, ModelOutput

Player = Literal["autoencoder", "discriminator"]
PLAYERS: tuple[Player, ...] = ("autoencoder", "discriminator")


class Players(nn.Module):
    """What is trained where the objective has an adversarial term."""

    def __init__(
        self, autoencoder: AutoEncoder, discriminator: nn.Module, term: AdversarialTerm
    ) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self.discriminator = discriminator
        self._term = term

    def forward(
        self,
        x: Tensor,
        *,
        target: Tensor | None = None,
        generator_plays: bool = True,
        **settings: object,
    ) -> ModelOutput | tuple[ModelOutput, Game]:
        """Run the autoencoder and, if `target` [B, *event] is given, the discriminator.

        generator_plays: whether the autoencoder minimises its adversarial loss in this step. An
        idle discriminator has loss weight 0 and learning rate 0, because engines require a gradient
        of every parameter in every step.
        """
        output: ModelOutput = self.autoencoder(x, target=target, **settings)
        if output.target is None:
            return output
        assert output.decoded is not None
        mean = self.autoencoder.config.likelihood.mean(output.decoded).detach()
        generator = self._generator(mean) if generator_plays else None
        real, fake = widen(self.discriminator(torch.cat([output.target.to(mean), mean]))).chunk(2)
        return output, Game(real, fake, generator)

    def _generator(self, mean: Tensor) -> tuple[Tensor, Tensor]:
        """The generator's loss [B] at the reconstructions, and its gradient there."""
        seen = mean.clone().requires_grad_()
        loss = self._term.generator_loss(widen(self.discriminator(seen)))
        with torch.autocast(seen.device.type, enabled=False):
            [gradient] = torch.autograd.grad(loss.sum(), seen)
        return loss.detach(), gradient


def freeze(module: nn.Module, patterns: Sequence[str]) -> None:
    """Leave out of the training the parameters whose names in a checkpoint match a pattern.

    Raises UserError if a pattern matches nothing, or if the autoencoder has nothing left to train.
    """
    parameters = {checkpoint_name(name): value for name, value in module.named_parameters()}
    for pattern in patterns:
        matching = [name for name in parameters if fnmatchcase(name, pattern)]
        if not matching:
            raise UserError(
                f"freeze: {pattern!r} matches no parameter; the nearest are "
                f"{', '.join(_nearest(pattern, list(parameters)))}."
            )
        for name in matching:
            parameters[name].requires_grad_(False)
    if not any(p.requires_grad and player_of(n) == "autoencoder" for n, p in parameters.items()):
        raise UserError(
            f"freeze: [{', '.join(patterns)}] leaves no parameter of the autoencoder to train: "
            "name fewer."
        )


def _nearest(pattern: str, names: Sequence[str]) -> list[str]:
    """Return the names, and patterns of all that a module holds, that are most like `pattern`."""
    parts = [name.split(".") for name in names]
    modules = {".".join([*p[:depth], "*"]) for p in parts for depth in range(1, len(p))}
    return get_close_matches(pattern, [*sorted(modules), *names], n=3, cutoff=0.0)


def checkpoint_name(name: str) -> str:
    """Return a tensor's name in a checkpoint; the autoencoder's has no prefix."""
    return name.removeprefix("autoencoder.")


def player_of(name: str) -> Player:
    """Return the player of a parameter, by its name in the module or in a checkpoint."""
    return "discriminator" if name.startswith("discriminator.") else "autoencoder"
