"""The YAML that a config may use: YAML 1.2's scalars, lists and mappings, and nothing else.

PyYAML reads YAML 1.1, where 1e-4 is a string, `no` is false, 1:30 is 90, 017 is 15, and the last
of two equal keys wins without a word. W&B sweeps write null as Python's None.
"""

import re
from collections.abc import Hashable
from typing import Any, ClassVar

import yaml

# tag, pattern of the whole scalar, its possible first characters
SCALARS = (
    ("null", r"~|null|Null|NULL|None|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
)
TAGS = {
    f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map")
}


class StrictLoader(yaml.SafeLoader):
    """Note duplicate keys, refuse aliases and every tag outside YAML's core schema."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}
    yaml_constructors: ClassVar[dict[Any, Any]] = {
        tag: constructor
        for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag in TAGS
    }

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.duplicates: list[str] = []

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Refuse aliases: they make a config hard to read."""
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem="aliases (*name) are not read", problem_mark=mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Note each key that is given twice, with both lines."""
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if key.value in lines:
                first = lines[key.value]
                self.duplicates.append(f"{key.value}: given twice, on lines {first} and {line}")
            lines[key.value] = line
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """Read decimal digits; a leading zero does not mean octal."""
        return int(node.value)


# Line breaks of YAML 1.1 that PyYAML writes unescaped and reads back as a space.
BREAKS = frozenset("\r\x85\u2028\u2029")


class StrictDumper(yaml.SafeDumper):
    """Quote each string that a reader of YAML 1.1 or of this dialect takes for another type."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        """Write unusual line breaks as escapes."""
        style = '"' if BREAKS & set(text) else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


StrictDumper.add_representer(str, StrictDumper.represent_text)


for _name, _pattern, _first in SCALARS:
    for _class in (StrictLoader, StrictDumper):
        _class.add_implicit_resolver(
            f"tag:yaml.org,2002:{_name}", re.compile(rf"^(?:{_pattern})$"), _first
        )
StrictLoader.add_constructor("tag:yaml.org,2002:int", StrictLoader.construct_yaml_int)


def parse(text: str) -> tuple[Any, list[str]]:
    """Read one YAML document: its plain value, and the problems found in it."""
    try:
        loader = StrictLoader(text)
    except yaml.YAMLError as error:  # a character that YAML does not allow
        return None, [f"not valid YAML: {' '.join(str(error).split())}"]
    try:
        return loader.get_single_data(), loader.duplicates
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        return None, [f"{where}not valid YAML: {error.problem or error.context}"]
    except (yaml.YAMLError, ValueError) as error:  # ValueError: digits beyond Python's limit
        return None, [f"not valid YAML: {error}"]
    finally:
        loader.dispose()


def write(value: Any) -> str:
    """The plain value as YAML that `parse` reads back to an equal one."""
    return yaml.dump(value, Dumper=StrictDumper, sort_keys=False, allow_unicode=True, width=100)
