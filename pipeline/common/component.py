"""The base of everything that carries settings."""

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.common.explain import complaint, explain


class Component(BaseModel):
    """Frozen settings together with the behaviour that they set.

    Unknown keys are errors, defaults are validated like given values, and nothing changes after
    construction: derived values are properties. Members of a family (corruptions, backbones ...)
    carry a `kind` literal, and the family's `__init__.py` lists them in one tagged union.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False
    )

    def __init__(self, /, **settings: Any) -> None:
        """Check the settings; raises UserError with all problems, in the words that a file gets."""
        try:
            super().__init__(**settings)
        except ValidationError as error:
            name = type(self).__name__
            raise complaint(name, explain(error, type(self))) from None

    # pydantic's own mark: a component inside another is checked with the whole, so that the
    # problems of all are told at once, by their paths from the top.
    __init__.__pydantic_base_init__ = True  # pyright: ignore[reportFunctionMemberAccess]
