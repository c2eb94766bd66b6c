"""Validation errors as a user reads them: dotted path, given value, allowed bound, suggestion.

pydantic says `('corruptions', 0, 'masking', 'ratioo') extra_forbidden`; a person needs
`corruptions.0.ratioo: unknown key (got 0.5); did you mean 'ratio'?`. To get there the location is
walked along the annotations: labels that name a union's member are dropped, and the walk ends at
the model that knows which keys, kinds and bounds it has.
"""

import json
import types
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Annotated, Any, NamedTuple, Union, cast, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from pipeline.common.errors import UserError

MAX_SHOWN_CHARACTERS = 80  # of a value inside a message

Part = str | int  # one step of a path: a key or a list index


def show(value: Any) -> str:
    """The value as YAML's flow style (= JSON) writes it, cut to a readable length."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= MAX_SHOWN_CHARACTERS else text[: MAX_SHOWN_CHARACTERS - 3] + "..."


def did_you_mean(given: object, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the nearest known name, or nothing."""
    matches = get_close_matches(str(given), sorted(known), n=1)
    return f"; did you mean '{matches[0]}'?" if matches else ""


def alternatives(annotation: Any) -> tuple[Any, ...]:
    """The members of a union without None; a tuple of one for anything else."""
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) not in (Union, types.UnionType):
        return (annotation,)
    members = tuple(member for member in get_args(annotation) if member is not type(None))
    return alternatives(members[0]) if len(members) == 1 else members


def as_model(annotation: Any) -> type[BaseModel] | None:
    """The annotation itself if it is a model class."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return None


def kind_of(annotation: Any) -> str | None:
    """The `kind` literal of a family's member, None for anything else."""
    model = as_model(annotation)
    field = model.model_fields.get("kind") if model else None
    tags = get_args(field.annotation) if field else ()
    return str(tags[0]) if tags else None


def kinds(annotation: Any) -> dict[str, type[BaseModel]]:
    """The members of a tagged union, nested ones included, by `kind`."""
    found: dict[str, type[BaseModel]] = {}
    for member in alternatives(annotation):
        kind, model = kind_of(member), as_model(member)
        if kind is not None and model is not None:
            found[kind] = model
        elif len(alternatives(member)) > 1:
            found |= kinds(member)
    return found


def child(annotation: Any, key: Part) -> Any:
    """The annotation of one field, list element or dict value; Any where nothing is known."""
    model = as_model(annotation)
    if model is not None:
        field = model.model_fields.get(str(key))
        return field.annotation if field else Any
    arguments = get_args(annotation)
    if not arguments:
        return Any
    if get_origin(annotation) is tuple and isinstance(key, int) and arguments[-1] is not Ellipsis:
        return arguments[key] if key < len(arguments) else Any
    return arguments[-1] if isinstance(key, str) else arguments[0]


def narrow(annotation: Any, value: Any) -> Any:
    """The union's member with the `kind` of `value`, or the only possible one."""
    members = alternatives(annotation)
    if isinstance(value, Mapping):
        mapping = cast(Mapping[str, Any], value)
        tagged = kinds(annotation)
        if mapping.get("kind") in tagged:
            return tagged[mapping["kind"]]
        members = tuple(m for m in members if as_model(m) or get_origin(m) is dict) or members
    return members[0] if len(members) == 1 else Any


def _member_named(members: Sequence[Any], label: Part) -> Any:
    """The union's member behind a label in pydantic's location, Any if it cannot be told."""
    for member in members:
        bare = alternatives(member)  # without Annotated
        member = bare[0] if len(bare) == 1 else member
        if label in (kind_of(member), getattr(member, "__name__", None)):
            return member
        if str(label).startswith("tagged-union") and kinds(member) and not as_model(member):
            return member
    return Any


class ErrorLocation(NamedTuple):
    """The location of an error: its dotted path, and the types there."""

    path: list[Part]
    holder: Any  # annotation of the model, list or mapping that holds the last part
    annotation: Any  # annotation of the value itself


def locate(annotation: Any, location: Sequence[Part]) -> ErrorLocation:
    """Walk pydantic's location along the annotations, dropping the labels of union members."""
    path: list[Part] = []
    holder: Any = annotation
    for part in location:
        members = alternatives(annotation)
        if len(members) == 1:
            holder = members[0]
            annotation = child(holder, part)
            path.append(part)
        else:
            annotation = _member_named(members, part)
    return ErrorLocation(path, holder, annotation)


# Expectations in pydantic's words and in ours.
REWORDED = {
    "Input should be": "must be",
    "a valid integer, got a number with a fractional part": "an integer",
    "a valid integer, unable to parse string as an integer": "an integer",
    "a valid number, unable to parse string as a number": "a number",
    "a valid boolean, unable to interpret input": "true or false",
    "a valid integer": "an integer",
    "a valid number": "a number",
    "a valid string": "a string",
    "a valid boolean": "true or false",
    "a valid list": "a list",
    "a valid array": "a list",
    "a valid tuple": "a list",
    "a valid dictionary": "a mapping",
    "an object": "a mapping",
}


def _expectation(error: ErrorDetails) -> str:
    """The error's text in our words: `must be greater than 0`."""
    message = error["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    for theirs, ours in REWORDED.items():
        message = message.replace(theirs, ours)
    return message


def _unknown_key(location: ErrorLocation, given: Any) -> str:
    model = as_model(location.holder)
    known = list(model.model_fields) if model else []
    hint = did_you_mean(location.path[-1], known) or f"; known keys: {', '.join(known)}"
    return f"unknown key (got {show(given)}){hint}"


def _explain(error: ErrorDetails, annotation: Any) -> tuple[str, str]:
    """One error as (dotted path, what is wrong and what would be right)."""
    location = locate(annotation, error["loc"])
    path, given = location.path, error["input"]
    match error["type"]:
        case "extra_forbidden":
            text = _unknown_key(location, given)
        case "missing":
            text = "required, but not given"
        case "model_type" | "model_attributes_type":
            text = f"must be a mapping (got {show(given)})"
        case "union_tag_not_found":
            path, text = (
                [*path, "kind"],
                f"required; choices: {', '.join(kinds(location.annotation))}",
            )
        case "union_tag_invalid":
            tag, choices = error.get("ctx", {})["tag"], kinds(location.annotation)
            hint = did_you_mean(tag, choices)
            text = f"unknown kind '{tag}' (choices: {', '.join(choices)}){hint}"
            path = [*path, "kind"]
        case "literal_error":
            choices = [str(choice) for choice in get_args(alternatives(location.annotation)[0])]
            text = f"{_expectation(error)} (got {show(given)}){did_you_mean(given, choices)}"
        case _:
            # A mapping is not shown: the text of the rule names its fields.
            shown = "" if isinstance(given, dict) else f" (got {show(given)})"
            text = f"{_expectation(error)}{shown}"
    return ".".join(map(str, path)), text


def explain(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """All problems of a failed validation, one line each, in the order of the fields.

    A value that fits no member of a plain union fails once per member: those become one line, or
    none where another member got further into the value.
    """
    by_path: dict[str, list[str]] = {}
    for details in error.errors(include_url=False):
        path, text = _explain(details, model)
        texts = by_path.setdefault(path, [])
        if text not in texts:
            texts.append(text)
    return [
        f"{path}: {' or '.join(texts)}" if path else " or ".join(texts)
        for path, texts in by_path.items()
        if not any(other.startswith(f"{path}.") for other in by_path if path)
    ]


def complaint(where: str, problems: Sequence[str]) -> UserError:
    """All problems of `where`, a file or a component, as one error."""
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return UserError("\n  ".join([f"{where} has {count}:", *problems]))
