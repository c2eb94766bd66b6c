"""The house as rules: the spine's wings, imports in one direction, small files, full types.

A wing may import from wings further down the spine, and a room of a wing from its others, as long
as that makes no circle. `pytest -s -k rooms_and_floors` prints the house.
"""

import ast
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

from tests.processes import ROOT

# From high to low: wings, or modules, of `pipeline`. Those on one line may know each other, in one
# direction. `report` and `metrics` have no folder yet. The package `latentmill`
# stands above them all.
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
MAY_IMPORT = {
    "latentmill": ("latentmill", "pipeline"),
    "launch": ("launch", "pipeline.common"),
    "pipeline.commands": ("launch",),
}
MAX_LOOSE_MODULES = 4  # files directly in pipeline/, besides __init__.py
MAX_NAMES_AT_THE_TOP = 20
MAX_FILE_LINES = 300
MAX_FUNCTION_LINES = 60  # only train() may be longer

LEVEL_OF = {
    name: len(SPINE) - level for level, names in enumerate(SPINE) for name in names.split(" | ")
}
OURS = ("latentmill", "pipeline", "launch")
FILES = sorted(path for top in OURS for path in (ROOT / top).rglob("*.py"))
TREES = {path: ast.parse(path.read_text()) for path in FILES}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in FILES
}
NAMES = {path: name for name, path in MODULES.items()}


def none_of(problems: Iterable[tuple[Path, str]]) -> None:
    """Fail with a line for each problem."""
    lines = [f"{path.relative_to(ROOT)}: {problem}" for path, problem in problems]
    assert not lines, "\n".join(lines)


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


def room_of(module: str) -> str:
    """A name directly in `pipeline`, or another package of ours as one; '' as `wing` has it."""
    top = module.split(".")[0]
    return wing(module) if top == "pipeline" else top


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
    """Every room, with the rooms it knows."""
    found: dict[str, set[str]] = {}
    for path, name in NAMES.items():
        room = room_of(name)
        known = found.setdefault(room, set()) if room else set()
        for _, module in imports(TREES[path]):
            known |= {room_of(module)} - {"", room}
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


def test_imports_point_down():
    none_of(
        (path, f"line {line} imports {imported}")
        for path, name in NAMES.items()
        for line, imported in imports(TREES[path])
        if not is_allowed(name, imported)
    )


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


def loaded_by(name: str) -> Iterator[str]:
    """The modules that must have been loaded before a module's own lines run.

    `from a import b` asks a for b, even where b is a module; and importing a.b imports a.
    """
    for node in ast.walk(TREES[MODULES[name]]):
        if isinstance(node, ast.ImportFrom) and node.module in MODULES:
            yield node.module
    for _, module in imports(TREES[MODULES[name]]):
        yield module
        packages = (module.rsplit(".", depth)[0] for depth in range(1, module.count(".") + 1))
        yield from (package for package in packages if not name.startswith(f"{package}."))


def test_imports_make_no_circle():
    edges = {name: sorted(set(loaded_by(name)) - {name}) for name in MODULES}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail[trail.index(name) :], name])
        if name not in done:
            for other in edges.get(name, ()):
                visit(other, (*trail, name))
            done.add(name)

    for name in MODULES:
        visit(name, ())


def functions() -> Iterator[tuple[Path, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Every function of every file."""
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield path, node


def test_imports_stand_at_the_top():
    none_of(
        (path, f"line {line}: {function.name}() imports {imported}")
        for path, function in functions()
        # A verb imports its work in `run`, so that --help answers without torch.
        if ROOT / "pipeline" / "commands" not in path.parents
        for line, imported in imports(function)
    )


def test_files_are_short():
    lengths = {path: len(path.read_text().splitlines()) for path in FILES}
    none_of((path, f"{n} lines") for path, n in lengths.items() if n > MAX_FILE_LINES)


def test_functions_are_short():
    none_of(
        (path, f"{function.name}() has {lines} lines")
        for path, function in functions()
        if (lines := (function.end_lineno or 0) - function.lineno + 1) > MAX_FUNCTION_LINES
        and (function.name, path.name) != ("train", "train.py")
    )


def untyped(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """The arguments without a type, and `return` if the result has none."""
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    named += [extra for extra in (arguments.vararg, arguments.kwarg) if extra]
    bare = [a.arg for a in named if a.annotation is None and a.arg not in ("self", "cls")]
    return bare if function.returns is not None else [*bare, "return"]


def test_every_argument_and_result_is_annotated():
    none_of(
        (path, f"line {function.lineno}: {function.name}() leaves {bare} untyped")
        for path, function in functions()
        if (bare := untyped(function))
    )


def test_every_file_says_what_it_is_for():
    none_of((path, "no docstring") for path, tree in TREES.items() if not ast.get_docstring(tree))
