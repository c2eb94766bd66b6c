"""The bound on the likelihood, where the model has one."""

from typing import Literal

from torch import Tensor

from pipeline.losses.objective import bits_per_dimension, negative_elbo
from pipeline.losses.terms import gaussian_kl
from pipeline.metrics.base import EvaluatedBatch, MeanMetric


class LogLikelihood(MeanMetric):
    """kl, the rate; nats, a bound on -ln p(x); for densities also bits_per_dimension.

    Uses one sample of the posterior per image. No figures if the bottleneck has no density, and no
    bound if the likelihood is not in nats.
    """

    kind: Literal["log_likelihood"] = "log_likelihood"

    @property
    def ranked_by(self) -> str | None:
        """None: the values depend on the sample of the posterior."""
        return None

    def per_image(self, batch: EvaluatedBatch) -> dict[str, Tensor]:
        posterior = batch.output.posterior
        if posterior is None or posterior.logvar is None:
            return {}
        values = {"kl": gaussian_kl(posterior).flatten(1).sum(1)}
        if batch.likelihood.is_nats:
            values["nats"] = negative_elbo(batch.losses, posterior)
        if batch.likelihood.is_density:
            num_elements = batch.clean[0].numel()
            values["bits_per_dimension"] = bits_per_dimension(
                values["nats"], num_elements, batch.value_bits
            )
        return values
