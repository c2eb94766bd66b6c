"""The game against the update of both players in turn: two optimizers, two backwards.

    reference.py CONFIG SETTING... -> one line of JSON

Runs in a copy of the tree that has the member `duel`, in one process.
"""

import copy
import json
import sys
from pathlib import Path

import torch
from torch import Tensor

from pipeline.common import strict
from pipeline.config import TrainConfig
from pipeline.data.index import Index
from pipeline.distributed.runtime import Runtime
from pipeline.losses.objective import gaussian_kl
from pipeline.losses.players import Players
from pipeline.training.build import make_forward, make_strategy, warm_up_loss
from tests.shards import open_stream


class TwoSteps:
    """The players as anyone would train them, from the same weights."""

    def __init__(self, players: Players, config: TrainConfig) -> None:
        players = copy.deepcopy(players)
        self.autoencoder, self.discriminator = players.autoencoder, players.discriminator
        self.left = list(self.autoencoder.parameters())
        self.right = list(self.discriminator.parameters())
        self.config, self.term = config, config.objective.adversarial
        assert self.term is not None
        settings = {"weight_decay": 0.0, "eps": config.optimizer.epsilon}
        betas = (config.optimizer.beta1, config.optimizer.beta2)
        self.optimizers = [
            torch.optim.AdamW(self.left, betas=betas, **settings),
            torch.optim.AdamW(
                self.right,
                betas=(self.term.discriminator.beta1, betas[1]),
                **settings,
            ),
        ]

    def losses(self, inputs) -> tuple[Tensor, Tensor, Tensor]:
        """The reconstruction's loss, the generator's, and the discriminator's, of the batch."""
        likelihood = self.config.model.likelihood
        output = self.autoencoder(inputs.corrupted, keys=inputs.noise_keys)
        nll = likelihood.nll(output.decoded, inputs.clean, output.learned).flatten(1).sum(1)
        kl = gaussian_kl(output.posterior).flatten(1).sum(1)
        mean = likelihood.mean(output.decoded)
        generator = self.term.generator_loss(self.discriminator(mean))
        # Real and false together: apart, they cancel in float32 to 4e-6 only.
        judged = self.discriminator(torch.cat([inputs.clean, mean.detach()]))
        own = self.term.discriminator_loss(*judged.chunk(2))
        return tuple((loss * inputs.weight).mean() for loss in (nll + kl, generator, own))

    def gradients(self, inputs, weights) -> tuple[list[Tensor], list[Tensor], float]:
        """Of both players, each of its own loss; and the game's share of the autoencoder's."""
        rest, generator, own = self.losses(inputs)
        left, right = self.left, self.right
        generator = weights["duel"] * generator
        plain, game, mine = (
            list(torch.autograd.grad(loss, left, retain_graph=True))
            for loss in (rest, generator, rest + generator)
        )
        other = torch.autograd.grad(weights["discriminator"] * own, right)
        share = norm_of(game) / (norm_of(game) + norm_of(plain))
        return mine, list(other), share

    def update(self, inputs, weights, rates) -> None:
        """One step of each player."""
        mine, other, _ = self.gradients(inputs, weights)
        for optimizer, gradients, rate in zip(
            self.optimizers, (mine, other), rates.values(), strict=True
        ):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()


def norm_of(parts: list[Tensor]) -> float:
    return float(torch.linalg.vector_norm(torch.cat([part.flatten() for part in parts])))


def difference(left: list[Tensor], right: list[Tensor]) -> float:
    """The norm of the difference, relative to that of the second."""
    return norm_of([a - b for a, b in zip(left, right, strict=True)]) / norm_of(right)


def main(config: str, *settings: str) -> None:
    loaded = strict.load(TrainConfig, Path(config), settings)
    runtime = Runtime.start(accumulation=1)
    forward = make_forward(loaded, runtime.device)
    strategy = make_strategy(loaded, runtime)
    strategy.warm_up(warm_up_loss(loaded, forward, strategy, runtime))
    players = strategy.model
    assert isinstance(players, Players)
    start = [value.detach().clone() for value in players.discriminator.parameters()]
    reference = TwoSteps(players, loaded)
    found: dict[str, list[float]] = {"gradients": [], "shares": [], "norms": []}
    index = Index.open(loaded.data.path)
    stream = open_stream(
        loaded.data,
        index=index,
        seed=loaded.seed,
        batch_size=loaded.batch_size,
        num_steps=loaded.num_steps,
    )
    with stream:
        for step, batch in enumerate(stream):
            samples = step * loaded.batch_size
            weights, rates = (
                loaded.objective.weights_at(samples),
                loaded.learning_rates_at(samples),
            )
            strategy.set_learning_rates(rates)
            inputs = forward.inputs(batch, "train")
            with strategy.accumulate(is_last=True):
                _, losses = forward.run(players, inputs, weights=weights, samples=samples)
                strategy.backward((losses.total * inputs.weight).sum() / len(inputs.weight))
            mine, other, share = reference.gradients(inputs, weights)
            if step == 0:
                sides = ((players.autoencoder, mine), (players.discriminator, other))
                found["gradients"] = [
                    difference([part.grad for part in side.parameters()], expected)
                    for side, expected in sides
                ]
            result = strategy.step()
            assert result.discriminator_norm is not None
            found["norms"].append(abs(float(result.discriminator_norm) / norm_of(other) - 1))
            found["shares"].append(share)
            reference.update(inputs, weights, rates)
    moved = zip(players.discriminator.parameters(), start, strict=True)
    report = {
        "gradients": max(found["gradients"]),
        "share": min(found["shares"]),
        "norms": max(found["norms"]),
        "weights": max(
            difference(list(players.autoencoder.parameters()), reference.left),
            difference(list(players.discriminator.parameters()), reference.right),
        ),
        "moved": max(float((now - then).abs().max()) for now, then in moved),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
