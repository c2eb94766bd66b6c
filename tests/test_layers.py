"""The architecture as rules: imports in one direction, small files and functions, full types.

The layers stand here as data. A module may import from layers below, and from its own layer as long
as that makes no cycle.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.processes import ROOT

# From low to high; an entry is a module or a package with everything in it.
LAYERS = (
    "errors needs console component digest files outcome rng schedules strict precision tars verbs",
    "corruptions likelihoods regularisers models writers",
    "objective data forward",
    "meeting runtime strategies metrics optimizer wandb_pieces wandb_sink",
    "checkpoint retention resume watchdog quarantine ledger monitor latents",
    "evaluation",
    "config",
    "rundir build",
    "train evaluate export export_model",
    "probe bench doctor report demo order",
    "__main__",
)
LAYER_OF = {name: level for level, names in enumerate(LAYERS) for name in names.split()}
OURS = ("pipeline", "launch")
MAX_FILE_LINES = 300
MAX_FUNCTION_LINES = 60  # only train() may be longer

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


def layer(module: str) -> int:
    parts = module.split(".")
    assert parts[0] == "pipeline"
    return -1 if len(parts) == 1 else LAYER_OF[parts[1]]  # `pipeline` itself holds the version


def test_every_module_has_a_layer():
    tops = {name.split(".")[1] for name in MODULES if name.startswith("pipeline.")}
    assert tops <= set(LAYER_OF), f"not in LAYERS: {sorted(tops - set(LAYER_OF))}"


@each_file
def test_imports_point_down(path: Path):
    name = NAMES[path]
    for line, imported in imports(TREES[path]):
        assert imported.split(".")[0] == name.split(".")[0], f"line {line}: imports {imported}"
        if imported.startswith("pipeline"):
            assert layer(imported) <= layer(name), f"line {line}: {imported} is a higher layer"


def test_imports_make_no_cycle():
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
    if path == ROOT / "pipeline" / "__main__.py":
        return  # each verb imports its part, so that --help answers without torch
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
