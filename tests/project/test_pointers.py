"""Pointers lead somewhere: the paths and names that docstrings, comments and documents send to.

A bare name in backticks means something of its own file or wing. What lies elsewhere is written as
`WING.NAME` or `pipeline.WING.NAME`, so that the move of a file shows here.
"""

import ast
import io
import re
import sys
import tokenize
from collections.abc import Callable, Iterator
from functools import cache
from typing import NamedTuple

import pytest

from tests.processes import ROOT
from tests.project.test_readme import tracked

CODE = ("latentmill", "pipeline", "launch", "tests", "examples", "benchmarks", "docker")
DOCUMENTS = (
    *("README.md", "CONTRIBUTING.md", "Makefile", "pyproject.toml", ".ci/run"),
    *("docker/Dockerfile", "tests/conftest.py"),
    *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("*.yaml")),
)
SOURCES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for top in CODE
    for path in sorted((ROOT / top).rglob("*.py"))
}
TREES = {name: ast.parse(source) for name, source in SOURCES.items()}

PATH = re.compile(rf"(?<![\w./-])(?:{'|'.join((*CODE, 'configs', 'docs'))})/(?:[\w.*/-]*[\w*/])?")
DOTTED = re.compile(
    r"(?<![\w./-])(?:pipeline|launch|tests|benchmarks)(?!\.md\b)(?:\.[A-Za-z_]\w*)+"
)
FILE = re.compile(r"(?<![\w/.*])(?!__init__)\w[\w/]*\.py\b")
TICKED = re.compile(r"(?<!`)`([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)(?:\(\))?`")
SEE = re.compile(r"\b[Ss]ee `(\w+)`")
ANY = re.compile(r"(?<![A-Za-z])[A-Z]{3,}(?![A-Za-z])")  # KIND, NAME ...: a placeholder
FILE_TYPES = {"json", "jsonl", "parquet", "png", "py", "safetensors", "tar", "yaml"}
# Of others, and written without their module; or with the name of a module of ours.
OTHERS = {"add_subparsers", "isfile", "serialize", "to_numpy", "datasets", "safetensors", "wandb"}
OTHERS |= {"launch", "latentmill", "toctree", *sys.stdlib_module_names}

Check = Callable[[str, str], Iterator[str]]  # (text, file) -> what points into nothing
Bound = dict[str, ast.stmt]  # name -> the statement that binds it


class Class(NamedTuple):
    """What the classes of one name offer, and the names of their bases."""

    members: set[str]
    fields: set[str]
    bases: set[str]


class Module(NamedTuple):
    """What a module says, and the words of its code, strings included."""

    prose: list[tuple[int, str]]  # (line, text) of every docstring and comment
    words: set[str]


@cache
def module(file: str) -> Module:
    """A module, taken apart."""
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    owners = (node for node in ast.walk(TREES[file]) if isinstance(node, kinds))
    starts = {node.body[0].lineno for node in owners if ast.get_docstring(node, clean=False)}
    found = Module([], set())
    for token in tokenize.generate_tokens(io.StringIO(SOURCES[file]).readline):
        line = token.start[0]
        is_docstring = token.type == tokenize.STRING and line in starts
        if token.type == tokenize.COMMENT or is_docstring:
            found.prose.append((line, token.string))
        else:
            found.words.update(re.findall(r"\w+", token.string))
    return found


def names_in(nodes: list[ast.stmt]) -> Iterator[tuple[str, ast.stmt]]:
    """What statements bind: functions, classes, constants, imports."""
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name, node
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from (((one.asname or one.name).split(".")[0], node) for one in node.names)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found = (one for target in targets for one in ast.walk(target))
            yield from ((name.id, node) for name in found if isinstance(name, ast.Name))
        elif isinstance(node, ast.If):
            yield from names_in(node.body + node.orelse)


BOUND: dict[str, Bound] = {file: dict(names_in(tree.body)) for file, tree in TREES.items()}


@cache
def classes() -> dict[str, Class]:
    """Name -> what the classes of this name offer, in all of our code."""
    found: dict[str, Class] = {}
    for file, bound in BOUND.items():
        for node in (what for what in bound.values() if isinstance(what, ast.ClassDef)):
            one = found.setdefault(node.name, Class(set(), set(), set()))
            own = dict(names_in(node.body))
            lines = SOURCES[file].splitlines()[node.lineno : node.end_lineno]
            one.members.update(own, re.findall(r"\bself\.(\w+)", "\n".join(lines)))
            one.fields.update(n for n, what in own.items() if isinstance(what, ast.AnnAssign))
            one.bases.update(ast.unparse(base).split("[")[0] for base in node.bases)
    return found


@cache
def fields() -> set[str]:
    """The names of all settings, and of what records hold."""
    return set().union(*(one.fields for one in classes().values()))


def has_member(name: str, member: str) -> bool:
    """Whether a class of ours, or a base of it, has a member."""
    one = classes().get(name)
    return one is not None and (
        member in one.members or any(has_member(base, member) for base in one.bases)
    )


def wing(file: str) -> str:
    """The folder whose names a module may use without saying where they are."""
    parts = file.split("/")
    return "/".join(parts[: 2 if parts[0] == "pipeline" and len(parts) > 2 else 1]) + "/"


@cache
def below(folder: str) -> tuple[str, ...]:
    """The modules below a folder."""
    return tuple(file for file in SOURCES if file.startswith(folder))


@cache
def modules(folder: str) -> dict[str, list[str]]:
    """Name -> the modules and packages of this name below a folder."""
    found: dict[str, list[str]] = {}
    for file in below(folder):
        name = file.removesuffix("/__init__.py").removesuffix(".py").rpartition("/")[2]
        found.setdefault(name, []).append(file)
    return found


@cache
def bound_in(folder: str) -> set[str]:
    """The modules below a folder, and what they bind at their top."""
    return set(modules(folder)).union(*(BOUND[file] for file in below(folder)))


@cache
def words_in(folder: str) -> set[str]:
    """The modules below a folder, and every word of their code, strings included."""
    return set(modules(folder)).union(*(module(file).words for file in below(folder)))


def resolves(name: str) -> bool:
    """Whether a dotted name is a folder, a module, or something that a module binds."""
    parts = name.split(".")
    if ROOT.joinpath(*parts).is_dir():
        return True
    for cut in range(len(parts), 0, -1):
        base = "/".join(parts[:cut])
        file = next((f for f in (f"{base}.py", f"{base}/__init__.py") if f in TREES), None)
        if file is not None:
            rest = parts[cut:]
            known = not rest or rest[0] in BOUND[file]
            return known and (len(rest) < 2 or has_member(rest[0], rest[1]))
    return False


def is_known(name: str, file: str) -> bool:
    """Whether `first.second` is a module's, a class's, a setting's, or an object's nearby."""
    first, second = name.split(".")[:2]
    homes = modules(file.split("/")[0] + "/").get(first, [])
    if second in FILE_TYPES or isinstance(BOUND[file].get(first), ast.Import):
        return True
    if not homes and first not in classes():
        return first in OTHERS or first in words_in(wing(file))
    if any(second in BOUND[home] or second in modules(home.rpartition("/")[0]) for home in homes):
        return True
    is_setting = second in fields() and (first in fields() or first in module(file).words)
    return is_setting or has_member(first, second)


def paths(text: str, file: str) -> Iterator[str]:
    """Paths from the root of the repository."""
    for name in PATH.findall(text):
        if not any(ROOT.glob(ANY.sub("*", name).rstrip("/"))):
            yield name


def dotted(text: str, file: str) -> Iterator[str]:
    """Dotted names from the root of the repository."""
    for name in DOTTED.findall(text):
        if not ANY.search(name) and not resolves(name):
            yield name


def files(text: str, file: str) -> Iterator[str]:
    """Names of modules, which lie in the same wing."""
    for name in FILE.findall(text):
        near = any(f"/{other}".endswith(f"/{name}") for other in below(wing(file)))
        if not (near or ANY.search(name) or (ROOT / name).exists()):
            yield name


def ticked(text: str, file: str) -> Iterator[str]:
    """Names in backticks."""
    for name in TICKED.findall(text):
        near = is_known(name, file) if "." in name else name in words_in(wing(file))
        if not (near or name in OTHERS or DOTTED.fullmatch(name)):
            yield name


def seen(text: str, file: str) -> Iterator[str]:
    """What "see" sends to: a module, or what one binds; a word of the code is not enough."""
    for name in SEE.findall(text):
        own = (one for one, what in BOUND[file].items() if isinstance(what, ast.ClassDef))
        is_member = any(has_member(one, name) for one in own)
        if not is_member and name not in bound_in(wing(file)):
            yield f"see {name}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_documents_point_at_what_exists(document: str):
    text = (ROOT / document).read_text()
    found = [*paths(text, document), *dotted(text, document)]
    assert not found, f"{document} names what is not there: {found}"


def test_contributing_names_what_the_code_has():
    names = TICKED.findall((ROOT / "CONTRIBUTING.md").read_text())
    known = set().union(*(words_in(f"{top}/") for top in CODE))
    assert not [name for name in names if "." not in name and name not in known]


@pytest.mark.parametrize("top", CODE)
def test_docstrings_and_comments_point_at_what_exists(top: str):
    checks: tuple[Check, ...] = (paths, dotted, files)
    if top in ("pipeline", "launch"):
        checks += (ticked, seen)
    found = [
        f"{file}:{line}: {name}"
        for file in below(f"{top}/")
        for line, text in module(file).prose
        for check in checks
        for name in check(text, file)
    ]
    assert not found, "\n".join(["names of nothing, or of nothing in the same wing:", *found])


@pytest.mark.parametrize(
    ("check", "file", "text", "is_found"),
    [
        (paths, "pipeline/train.py", "tested in tests/strategies/.", True),
        (paths, "pipeline/train.py", "tests/data/test_KIND.py, configs/train/vae.yaml", False),
        (dotted, "pipeline/train.py", "pipeline.demo", True),
        (dotted, "pipeline/train.py", "pipeline.common.rng.nothing", True),
        (dotted, "pipeline/train.py", "pipeline.models.autoencoder.AutoEncoder.nothing", True),
        (dotted, "pipeline/train.py", "pipeline.models.autoencoder.AutoEncoder.forward", False),
        (files, "pipeline/export/run.py", "verify.py lists it", True),
        (files, "pipeline/export/run.py", "commit.py and verify/levels.py", False),
        (ticked, "pipeline/export/verify/levels.py", "`reencode.verify_nothing`", True),
        (ticked, "pipeline/losses/objective.py", "`schedules.Linear`", True),
        (ticked, "pipeline/config.py", "`schedules.LinearSchedule`, `data.split`", False),
        (ticked, "pipeline/losses/objective.py", "the caller's (`runtime`)", True),
        (ticked, "pipeline/train.py", "`rundir.claimed`", True),
        (seen, "pipeline/training/run_directory.py", "see `checkpoint`", True),
        (seen, "pipeline/training/run_directory.py", "see `loading`", False),
    ],
)
def test_the_checks_tell_something_from_nothing(check: Check, file: str, text: str, is_found: bool):
    assert bool(list(check(text, file))) == is_found


def test_nothing_cites_what_is_not_in_the_repository():
    word = "DES" + "IGN"
    texts = {name: (ROOT / name).read_text(errors="replace") for name in tracked()}
    found = sorted(name for name, text in texts.items() if word in text)
    assert not found, f"{word} is no part of the repository, but cited in {found}"
