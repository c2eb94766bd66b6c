"""The reference of settings, made from the models: a page names a model, conf.py calls `fill_in`.

`<!-- settings of MODULE.CLASS -->` becomes a table of the class's fields, and one of each component
in them; `<!-- settings of MODULE.CLASS: a.b c -->` one table of the settings named. Meanings
are the comments above or beside fields in the source, or the docstring of the field's component.
"""

import ast
import inspect
import io
import re
import tokenize
from collections.abc import Iterator
from importlib import import_module
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

PLACE = re.compile(r"^<!-- settings of ([\w.]+)\.(\w+)(?:: ([\w. ]+))? -->$", re.MULTILINE)
BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<", "min_length": "length ≥"}
NAMES = {int: "integer", float: "number", str: "text", bool: "true or false", type(None): "null"}
HEAD = "| setting | value | default | meaning |\n|---|---|---|---|"
Model = type[BaseModel]


def fill_in(_app: Any, _name: str, source: list[str]) -> None:
    """Sphinx's hook: put the tables into a page that asks for them."""

    def tables(found: re.Match[str]) -> str:
        model: Model = getattr(import_module(found[1]), found[2])
        if not found[3]:
            return "\n".join(sections(model, "", set()))
        return "\n".join([HEAD, *(row(*find(model, path), path) for path in found[3].split())])

    source[0] = PLACE.sub(tables, source[0])


def find(model: Model, path: str) -> tuple[Model, str]:
    """The model that has the last part of a dotted name, and that part."""
    first, _, rest = path.partition(".")
    return find(next(models(model.model_fields[first].annotation)), rest) if rest else (model, path)


def sections(model: Model, path: str, shown: set[Model]) -> Iterator[str]:
    """Heading, purpose and fields of a model, then those of what it holds and is not shown yet."""
    shown.add(model)
    kind, fields = kind_of(model), {k: v for k, v in model.model_fields.items() if k != "kind"}
    title = f"`{path}`" if path else "Top level"
    yield f"({label(model)})=\n### {title}{f': `{kind}`' if kind else ''}\n\n{purpose(model)}\n"
    yield "\n".join([HEAD, *(row(model, name, name) for name in fields), ""]) if fields else ""
    for name, field in fields.items():
        for held in models(field.annotation):
            if held not in shown:
                yield from sections(held, f"{path}.{name}".strip("."), shown)


def row(model: Model, name: str, shown_as: str) -> str:
    """The line of one field."""
    field = model.model_fields[name]
    bounds = dict.fromkeys(bounds_of((*field.metadata, field.annotation)))
    value = ", ".join([type_of(field.annotation), *bounds])
    cells = (f"`{shown_as}`", value, default(field), meaning(model, name))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def kind_of(model: Model) -> str | None:
    """The `kind` that chooses this model in its family."""
    return str(model.model_fields["kind"].default) if "kind" in model.model_fields else None


def label(model: Model) -> str:
    """The anchor of a model's table."""
    return re.sub(r"[._]", "-", f"{model.__module__}-{model.__name__}".lower())


def purpose(model: Model) -> str:
    """What a model is, in its own words."""
    return (inspect.getdoc(model) or "").split("\n\n")[0].replace("\n", " ")


def meaning(model: Model, name: str) -> str:
    """The comments above and beside a field, in the class that defines it; or what it holds."""
    for owner in (one for one in model.__mro__ if name in inspect.get_annotations(one)):
        source = inspect.getsource(owner)
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        texts = {t.start[0]: t.string[1:].strip() for t in tokens if t.type == tokenize.COMMENT}
        field = next(s for s in fields_in(source) if ast.unparse(s.target) == name)
        first = field.lineno
        while source.splitlines()[first - 2].strip().startswith("#"):
            first -= 1
        lines = range(first, (field.end_lineno or first) + 1)
        if any(line in texts for line in lines):
            return " ".join(texts[line] for line in lines if line in texts)
    held = list(models(model.model_fields[name].annotation))
    return purpose(held[0]) if len(held) == 1 else ""


def fields_in(source: str) -> Iterator[ast.AnnAssign]:
    """The annotated names of a class."""
    for node in ast.parse(source).body:
        assert isinstance(node, ast.ClassDef)
        yield from (inner for inner in node.body if isinstance(inner, ast.AnnAssign))


def models(annotation: Any) -> Iterator[Model]:
    """The components that a value of this type may hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) is not Literal:
        for inner in get_args(annotation):
            yield from models(inner)


def type_of(annotation: Any) -> str:
    """A type in words; components as links to their tables."""
    inner, origin = get_args(annotation), get_origin(annotation)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"[{kind_of(annotation) or 'section'}](#{label(annotation)})"
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in inner)
    if origin is Annotated:
        return type_of(inner[0])
    if origin is tuple:
        return f"list of {type_of(inner[0])}" if inner[-1:] == (...,) else f"list of {len(inner)}"
    if origin is dict:
        return f"mapping of {type_of(inner[0])} to {type_of(inner[1])}"
    return " or ".join(dict.fromkeys(map(type_of, inner))) or NAMES[annotation]


def bounds_of(parts: tuple[Any, ...]) -> Iterator[str]:
    """The limits of a value, wherever in its annotation they stand."""
    for part in parts:
        for name, sign in BOUNDS.items():
            if (limit := getattr(part, name, None)) is not None:
                yield f"{sign} {limit}"
        is_choice = get_origin(part) is Literal
        nested = () if is_choice else (*get_args(part), *getattr(part, "metadata", ()))
        yield from bounds_of((*nested, *getattr(part, "__metadata__", ())))


def default(field: FieldInfo) -> str:
    """The default as a file would say it; a section's own defaults stand in its table."""
    value = field.get_default(call_default_factory=True)
    if field.is_required():
        return "**required**"
    if isinstance(value, BaseModel):
        return f"`{kind_of(type(value))}`" if kind_of(type(value)) else ""
    if isinstance(value, tuple):
        return f"`[{', '.join(str(getattr(one, 'kind', one)) for one in value)}]`"
    return (
        f"`{'null' if value is None else str(value).lower() if isinstance(value, bool) else value}`"
    )
