"""What every corruption shares: its severity and what it returns."""

from typing import Annotated, NamedTuple

from pydantic import AfterValidator, Field
from torch import Tensor

from pipeline.common import rng
from pipeline.common.component import Component


class Corrupted(NamedTuple):
    """A corrupted batch, and which elements were replaced."""

    x: Tensor  # [B, *event], same dtype as the clean batch
    mask: Tensor | None  # bool [B, *event], True = replaced; None: no element is singled out


class CorruptionBase(Component):
    """A kind of corruption: settings, plus `__call__(x, keys) -> Corrupted`."""

    @property
    def has_mask(self) -> bool:
        """Whether single elements are replaced, and marked in the mask."""
        return True

    def check_event(self, event_shape: tuple[int, ...]) -> None:
        """Raise ValueError if this kind cannot act on such events; most act on any."""


def _ordered(severity: float | tuple[float, float]) -> float | tuple[float, float]:
    if isinstance(severity, tuple) and severity[0] > severity[1]:
        raise ValueError(
            f"a severity range is [lowest, highest], but {severity[0]} > {severity[1]}"
        )
    return severity


_Fraction = Annotated[float, Field(ge=0, le=1)]
_Scale = Annotated[float, Field(ge=0)]
# A severity is one number, or a range from which each sample draws its own, uniformly.
Fraction = Annotated[_Fraction | tuple[_Fraction, _Fraction], AfterValidator(_ordered)]
Scale = Annotated[_Scale | tuple[_Scale, _Scale], AfterValidator(_ordered)]


def draw_severity(severity: float | tuple[float, float], keys: Tensor, *, like: Tensor) -> Tensor:
    """Return each sample's severity, float32 [B, 1, ...] broadcastable to `like` [B, *event]."""
    low, high = severity if isinstance(severity, tuple) else (severity, severity)
    drawn = low + (high - low) * rng.uniform(rng.substream(keys, "severity"))
    return drawn.view(-1, *[1] * (like.ndim - 1))
