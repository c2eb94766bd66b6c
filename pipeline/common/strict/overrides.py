"""`a.b=c` on the command line: parsed by the dialect, applied to the plain tree of a config.

A list's elements go by index. Setting another `kind` starts that component afresh, because the
settings of the old kind mean nothing to the new one. A part that the file leaves out starts from
its default, so that changing one of its settings keeps the others.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from pipeline.common.explain import as_model, child, narrow, show
from pipeline.common.strict.dialect import parse


class Override(NamedTuple):
    """The path to a setting, and its new value."""

    path: tuple[str, ...]
    value: Any


def parse_overrides(arguments: Sequence[str]) -> tuple[list[Override], list[str]]:
    """Read `a.b=c` and `--a.b=c` (W&B's way): overrides in order of application, and problems."""
    overrides: dict[tuple[str, ...], Override] = {}
    problems: list[str] = []
    for argument in arguments:
        name, equals, text = argument.removeprefix("--").partition("=")
        path = tuple(name.split("."))
        if not equals or not all(path):
            problems.append(f"{show(argument)}: an override is written a.b=value")
            continue
        value, faults = parse(text)
        problems += [f"{name}: {fault}" for fault in faults]
        if path in overrides:
            problems.append(f"{name}: overridden twice")
        overrides[path] = Override(path, value)
    # A kind replaces its whole component, so it goes before the settings inside it, in whatever
    # order they came (W&B sorts by name).
    ordered = sorted(overrides.values(), key=lambda o: len(o.path) - (o.path[-1] == "kind"))
    return ordered, problems


def _default(annotation: Any, key: str) -> Any:
    """The default of a model's field as plain values; an empty mapping where there is none."""
    model = as_model(annotation)
    field = model.model_fields.get(key) if model else None
    if field is None or field.is_required():
        return {}
    plain = to_jsonable_python(field.get_default(call_default_factory=True))
    return {} if plain is None else plain


def _index(items: Sequence[Any], key: str) -> int:
    if not key.isdecimal() or int(key) >= len(items):
        raise LookupError(f"'{key}' is not an index into its {len(items)} elements (from 0)")
    return int(key)


def _enter(node: Any, key: str, annotation: Any) -> Any:
    """The list or mapping at `key`, made from the field's default where it is not given."""
    if isinstance(node, list):
        items = cast(list[Any], node)
        inner = items[_index(items, key)]
    else:
        mapping = cast(dict[str, Any], node)
        if mapping.get(key) is None:
            mapping[key] = _default(annotation, key)
        inner = mapping[key]
    if not isinstance(inner, dict | list):
        raise LookupError(f"'{key}' is {show(inner)}, which has no settings inside")
    return cast(Any, inner)


def _set(node: Any, key: str, value: Any) -> None:
    if isinstance(node, list):
        items = cast(list[Any], node)
        items[_index(items, key)] = value
        return
    mapping = cast(dict[str, Any], node)
    if key == "kind" and mapping.get("kind") != value:
        mapping.clear()
    mapping[key] = value


def apply(tree: dict[str, Any], override: Override, model: type[BaseModel]) -> None:
    """Set one value in the plain tree of `model`; LookupError where the path leads nowhere."""
    node: Any = tree
    annotation: Any = model
    for key in override.path[:-1]:
        inner = _enter(node, key, annotation)
        annotation = child(annotation, 0 if isinstance(node, list) else key)
        annotation = narrow(annotation, inner)
        node = inner
    _set(node, override.path[-1], override.value)
