"""The strict loader: YAML file + `a.b=c` overrides -> a validated tree of components.

    text -> dialect.parse -> plain dict -> overrides.apply -> pydantic -> frozen model
    model -> dump -> YAML that loads to an equal model

Every problem found on the way (duplicate keys, overrides that lead nowhere, unknown keys and
kinds, wrong types, values out of range) is collected, and all are reported at once as one
UserError. Nothing else feeds a config: no environment variable, no inheritance, no interpolation
(but for `{trial}` in a run directory, see `common.trial`).
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

from pydantic import BaseModel, ValidationError
from pydantic_core import to_jsonable_python

from pipeline.common.errors import UserError
from pipeline.common.explain import complaint, did_you_mean, explain
from pipeline.common.strict.dialect import parse, write
from pipeline.common.strict.overrides import apply, parse_overrides

M = TypeVar("M", bound=BaseModel)
FillIn = Callable[[dict[str, Any]], None]
ABSENT = "(absent)"  # in a Difference: the value is missing on one side


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        siblings = [other.name for other in path.parent.glob("*.yaml")]
        hint = did_you_mean(path.name, siblings)
        raise UserError(f"The config file {path} does not exist{hint or '.'}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The config file {path} cannot be read as text: {error}.") from error


def _plain_tree(
    text: str, overrides: Sequence[str], model: type[BaseModel], fill_in: FillIn | None
) -> tuple[dict[str, Any], list[str]]:
    """Return the file's tree, filled in and with the overrides applied, and the problems so far."""
    value, problems = parse(text)
    if value is not None and not isinstance(value, dict):
        problems.append("the file must be a mapping of settings, one `name: value` a line")
    tree = cast(dict[str, Any], value) if isinstance(value, dict) else {}
    if fill_in is not None and not problems:
        fill_in(tree)
    parsed, faults = parse_overrides(overrides)
    problems += faults
    for override in parsed:
        try:
            apply(tree, override, model)
        except LookupError as error:
            problems.append(f"{'.'.join(override.path)}: {error.args[0]}")
    return tree, problems


def load(
    model: type[M],
    path: Path | None,
    overrides: Sequence[str],
    *,
    text: str | None = None,
    fill_in: FillIn | None = None,
) -> M:
    """Read `path` (or `text`, or nothing but defaults), apply the overrides, validate as `model`.

    fill_in: adds missing values to the file's tree. Types are taken as written: "5" is not a
    number, true is not 1. Raises UserError with all problems.
    """
    if text is None:
        text = "" if path is None else _read(path)
    tree, problems = _plain_tree(text, overrides, model, fill_in)
    unreadable = not tree and bool(problems)  # then every required field would be missing, too
    try:
        # From JSON, pydantic's strict mode accepts a list for a tuple and a string for a path:
        # what YAML can express.
        loaded = None if unreadable else model.model_validate_json(json.dumps(tree), strict=True)
    except ValidationError as error:
        problems += explain(error, model)
        loaded = None
    if problems or loaded is None:
        raise complaint(str(path) if path else "The configuration", problems)
    return loaded


def set_default(tree: dict[str, Any], path: str, value: Any) -> None:
    """Set the dotted `path` in a file's tree, unless the file does."""
    *sections, key = path.split(".")
    for name in sections:
        section = tree.setdefault(name, {})
        if not isinstance(section, dict):
            return  # the wrong type is reported by the validation
        tree = cast(dict[str, Any], section)
    tree.setdefault(key, value)


def dump(model: BaseModel) -> str:
    """The resolved config, defaults included, as YAML that loads to an equal model."""
    return write(model.model_dump(mode="json"))


class Difference(NamedTuple):
    """One setting whose value differs between two trees."""

    path: str
    left: Any
    right: Any


def difference(
    left: BaseModel | Mapping[str, Any], right: BaseModel | Mapping[str, Any]
) -> list[Difference]:
    """The settings in which two configs differ, by dotted path, in the order of the left one.

    Of components of different kinds only the `kind` differs: their settings are not compared.
    """
    found: list[Difference] = []
    _compare(left, right, "", found)
    return found


def _items(value: Any) -> dict[str, Any] | None:
    """The named parts of a config, mapping or list, None for a leaf."""
    if isinstance(value, BaseModel):
        # Also the settings that a dump leaves out at their default.
        return {name: getattr(value, name) for name in type(value).model_fields}
    if isinstance(value, Mapping):
        return dict(cast(Mapping[str, Any], value))
    if isinstance(value, list | tuple):
        return {str(index): item for index, item in enumerate(cast(Sequence[Any], value))}
    return None


def _is_named(value: Any) -> bool:
    return isinstance(value, BaseModel | Mapping)


def _compare(left: Any, right: Any, path: str, found: list[Difference]) -> None:
    ours, theirs = _items(left), _items(right)
    if ours is None or theirs is None or _is_named(left) != _is_named(right):
        if left != right:
            found.append(Difference(path, to_jsonable_python(left), to_jsonable_python(right)))
        return
    keys = list(dict.fromkeys([*ours, *theirs]))
    if ours.get("kind") != theirs.get("kind"):
        keys = ["kind"]
    for key in keys:
        deeper = f"{path}.{key}" if path else key
        _compare(ours.get(key, ABSENT), theirs.get(key, ABSENT), deeper, found)
