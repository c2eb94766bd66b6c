"""The bound on the likelihood, where the model has one."""

from typing import Literal

from torch import Tensor

from pipeline.losses.objective import bits_per_dimension, negative_elbo
from pipeline.losses.terms import gaussian_kl
from pipeline.metrics.base import EvaluatedBatch, MeanMetric


class LogLikelihood(MeanMetric):
    """kl, the rate; nats, a bound on -ln p(x); for densities also bits_per_dimension.

    By one sample of the posterior per image. Nothing where the bottleneck has no density, and no
    bound where the likelihood is not in nats.
    """

    kind: Literal["log_likelihood"] = "log_likelihood"

    def per_image(self, seen: EvaluatedBatch) -> dict[str, Tensor]:
        """Return the figures that the model has."""
        posterior = seen.output.posterior
        if posterior is None or posterior.logvar is None:
            return {}
        values = {"kl": gaussian_kl(posterior).flatten(1).sum(1)}
        if seen.likelihood.is_nats:
            values["nats"] = negative_elbo(seen.losses, posterior)
        if seen.likelihood.is_density:
            num_elements = seen.clean[0].numel()
            values["bits_per_dimension"] = bits_per_dimension(values["nats"], num_elements)
        return values
