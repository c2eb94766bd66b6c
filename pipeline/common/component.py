"""The base of everything that carries settings."""

from collections.abc import Callable
from typing import Annotated, Any, cast

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from pipeline.common.explain import complaint, explain
from pipeline.common.files import why_no_directory, why_no_path


def _checked(reason_of: Callable[[str], str]) -> AfterValidator:
    """Refuse a text for which `reason_of` has a reason."""

    def check(text: str) -> str:
        if reason := reason_of(text):
            raise ValueError(reason)
        return text

    return AfterValidator(check)


# Settings that name files of this machine, where no URL works.
LocalPath = Annotated[str, _checked(why_no_path)]
LocalDirectory = Annotated[str, _checked(why_no_directory)]


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


def with_tuples(settings: Any) -> Any:
    """Return settings with tuples for lists: for what a validator with mode `before` returns.

    A file's lists may stand for tuples only as long as no such validator has seen them.
    """
    if isinstance(settings, dict):
        return {name: with_tuples(v) for name, v in cast(dict[str, Any], settings).items()}
    if isinstance(settings, list):
        return tuple(with_tuples(value) for value in cast(list[Any], settings))
    return settings
