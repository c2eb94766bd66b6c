"""The house as rules: the spine's wings, imports in one direction, small files, full types.

A wing may import from wings further down the spine, and a room of a wing from its others, as long
as that makes no circle. `pytest -s -k rooms_and_floors` prints the house.
"""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.processes import ROOT

# From high to low: wings, or modules, of `pipeline`. Those on one line may know each other, in one
# direction. `report` and `metrics` have their place, and no room yet.
SPINE = (
    "__main__",
    "commands",
    "train | export | report",
    "evaluation",
    "training",
    "config",
    "checkpoints",
    "monitoring",
    "distributed",
    "losses | metrics",
    "models",
    "corruptions | data | latents",
    "common",
)
# Besides: the launcher knows the common wing only, and only commands know the launcher.
MAY_IMPORT = {"launch": ("launch", "pipeline.common"), "pipeline.commands": ("launch",)}
MAX_LOOSE_MODULES = 4  # files directly in pipeline/, besides __init__.py
MAX_NAMES_AT_THE_TOP = 20
MAX_FILE_LINES = 300
MAX_FUNCTION_LINES = 60  # only train() may be longer

LEVEL_OF = {
    name: len(SPINE) - place for place, names in enumerate(SPINE) for name in names.split(" | ")
}
OURS = ("pipeline", "launch")
FILES = sorted(path for top in OURS for path in (ROOT / top).rglob("*.py"))
TREES = {path: ast.parse(path.read_text()) for path in FILES}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in FILES
}
NAMES = {path: name for name, path in MODULES.items()}

each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, module) of every import of our own code; `from a import b` gives a.b if a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, a.name) for a in node.names if a.name.split(".")[0] in OURS)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            module = node.module or ""
            if module.split(".")[0] in OURS:
                for alias in node.names:
                    full = f"{module}.{alias.name}"
                    yield node.lineno, full if full in MODULES else module


def wing(module: str) -> str:
    """The name below `pipeline` that a module belongs to; '' for `pipeline`, with the version."""
    return (module.split(".") + [""])[1]


def is_allowed(importer: str, imported: str) -> bool:
    """Whether the spine lets one module import another."""
    for start, others in MAY_IMPORT.items():
        knows = any(f"{imported}.".startswith(f"{other}.") for other in others)
        if f"{importer}.".startswith(f"{start}.") and knows:
            return True
    if not (importer.startswith("pipeline") and imported.startswith("pipeline")):
        return False
    ours, theirs = wing(importer), wing(imported)
    return theirs in ("", ours) or LEVEL_OF[theirs] <= LEVEL_OF[ours]


@cache
def rooms() -> dict[str, set[str]]:
    """Every room, a name directly in `pipeline` or `launch` as one, with the rooms it knows."""
    found: dict[str, set[str]] = {}
    for path, name in NAMES.items():
        room = wing(name) if name.startswith("pipeline") else "launch"
        known = found.setdefault(room, set()) if room else set()
        for _, module in imports(TREES[path]):
            other = wing(module) if module.startswith("pipeline") else "launch"
            known |= {other} - {"", room}
    return found


def floor_of(room: str, above: tuple[str, ...] = ()) -> int:
    """How many rooms stand below one another under a room, itself included."""
    assert room not in above, f"a circle of rooms: {' -> '.join([*above, room])}"
    trail = (*above, room)
    return 1 + max((floor_of(other, trail) for other in rooms()[room]), default=0)


def test_the_house_has_few_names_at_its_top():
    loose = {path.name for path in (ROOT / "pipeline").glob("*.py")} - {"__init__.py"}
    assert len(loose) <= MAX_LOOSE_MODULES, f"loose modules: {sorted(loose)}"
    tops = {p.name for p in (ROOT / "pipeline").iterdir()} - {"__pycache__"}
    assert len(tops) <= MAX_NAMES_AT_THE_TOP, sorted(tops)


def test_every_name_at_the_top_stands_in_the_spine():
    tops = {wing(name) for name in MODULES if name.startswith("pipeline.")}
    assert tops <= set(LEVEL_OF), f"not in SPINE: {sorted(tops - set(LEVEL_OF))}"


@each_file
def test_imports_point_down(path: Path):
    for line, imported in imports(TREES[path]):
        assert is_allowed(NAMES[path], imported), f"line {line}: imports {imported}"


def test_rooms_and_floors():
    floors: dict[int, list[str]] = {}
    for room in sorted(rooms()):
        floors.setdefault(floor_of(room), []).append(room)
    print()
    for floor, names in sorted(floors.items(), reverse=True):
        print(f"floor {floor:>2}: {', '.join(names)}")
    num_loose = len(list((ROOT / "pipeline").glob("*.py"))) - 1
    num_arrows = sum(map(len, rooms().values()))
    print(f"{len(rooms())} rooms, {len(floors)} floors, {num_arrows} arrows, {num_loose} loose")
    assert len(floors) <= len(SPINE)


def test_imports_make_no_circle():
    edges = {
        name: sorted({module for _, module in imports(TREES[path]) if module != name})
        for name, path in MODULES.items()
    }
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail[trail.index(name) :], name])
        if name not in done:
            for other in edges.get(name, ()):
                visit(other, (*trail, name))
            done.add(name)

    for name in MODULES:
        visit(name, ())


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (
        node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )


@each_file
def test_imports_stand_at_the_top(path: Path):
    if ROOT / "pipeline" / "commands" in path.parents:
        return  # a verb imports its work in `run`, so that --help answers without torch
    for function in functions(TREES[path]):
        for line, imported in imports(function):
            pytest.fail(f"line {line}: {function.name}() imports {imported}")


@each_file
def test_files_are_short(path: Path):
    assert len(path.read_text().splitlines()) <= MAX_FILE_LINES


@each_file
def test_functions_are_short(path: Path):
    for function in functions(TREES[path]):
        lines = (function.end_lineno or 0) - function.lineno + 1
        allowed = function.name == "train" and path.name == "train.py"
        assert allowed or lines <= MAX_FUNCTION_LINES, f"{function.name}() has {lines} lines"


@each_file
def test_every_argument_and_result_is_annotated(path: Path):
    for function in functions(TREES[path]):
        arguments = function.args
        named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        named += [extra for extra in (arguments.vararg, arguments.kwarg) if extra]
        bare = [a.arg for a in named if a.annotation is None and a.arg not in ("self", "cls")]
        assert not bare, f"line {function.lineno}: {function.name}() leaves {bare} untyped"
        assert function.returns is not None, f"line {function.lineno}: {function.name}() -> ?"


@each_file
def test_every_file_says_what_it_is_for(path: Path):
    assert ast.get_docstring(TREES[path])
