"""The base of everything that carries settings."""

from pydantic import BaseModel, ConfigDict


class Component(BaseModel):
    """Frozen settings together with the behaviour that they set.

    Unknown keys are errors, defaults are validated like given values, and nothing changes after
    construction: derived values are properties. Members of a family (corruptions, backbones ...)
    carry a `kind` literal, and the family's `__init__.py` lists them in one tagged union.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False
    )
