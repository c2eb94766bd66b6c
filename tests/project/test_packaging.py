"""What is imported is declared, what is declared is pinned, and nothing points at one machine."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml

from pipeline.common.needs import TRAIN
from tests.processes import ROOT
from tests.project.test_layers import FILES, MODULES, TREES, imports

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONSTRAINTS = [
    line for line in (ROOT / "constraints.txt").read_text().splitlines() if line[:1] not in "#"
]


def normalised(requirement: str) -> str:
    return re.split(r"[<>=!~\[; ]", requirement)[0].lower().replace("_", "-")


EXTRAS = {
    extra: {normalised(one) for one in wanted} - {"latentmill"}
    for extra, wanted in PROJECT["optional-dependencies"].items()
}
BASE = {normalised(requirement) for requirement in PROJECT["dependencies"]}
# pydantic pins the one version of its core that it works with, and re-exports only parts of it.
COMES_WITH = {"pydantic-core": "pydantic"}
OWNERS = packages_distributions()


def third_party_imports(paths: Iterable[Path], *, deferred: bool = False) -> dict[str, Path]:
    """Top-level names of packages of others, each with a file that imports it.

    deferred: count what is imported by `import_module` only when it is needed.
    """
    found: dict[str, Path] = {}
    for path in paths:
        for node in ast.walk(TREES[path]):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            elif deferred and isinstance(node, ast.Call) and "import_module" in ast.dump(node.func):
                names = [word.value for word in node.args if isinstance(word, ast.Constant)]
            else:
                continue
            found |= {name.split(".")[0]: path for name in names}
    ours = {"latentmill", "launch", "pipeline", "_typeshed"}
    return {k: v for k, v in found.items() if k not in ours | set(sys.stdlib_module_names)}


def owners(name: str) -> set[str]:
    """The distributions that a top-level name may come from."""
    found = {normalised(owner) for owner in OWNERS.get(name, [name])}
    return {COMES_WITH.get(owner, owner) for owner in found}


def files_of_the_reader() -> set[Path]:
    """What `import pipeline.latents` runs, and what that may import."""
    todo, seen = ["pipeline.latents"], set[str]()
    while todo:
        name = todo.pop()
        if name in MODULES and name not in seen:
            seen.add(name)
            todo += [name.rpartition(".")[0], *(used for _, used in imports(TREES[MODULES[name]]))]
    return {MODULES[name] for name in seen}


def test_what_the_reader_imports_comes_with_a_plain_installation():
    files = files_of_the_reader()
    assert ROOT / "pipeline/data/storage/s3.py" in files
    found = third_party_imports(files)
    for name, path in found.items():
        assert owners(name) & BASE, f"{path.relative_to(ROOT)} imports {name}: not in dependencies"
    assert set().union(*map(owners, found)) >= BASE, "dependencies that the reader does not need"


def test_every_import_is_a_declared_dependency():
    for name, path in third_party_imports(FILES).items():
        declared = BASE | EXTRAS["train"]
        assert owners(name) & declared, f"{path.relative_to(ROOT)} imports {name}: not declared"


def test_every_dependency_is_used():
    used = set().union(*map(owners, third_party_imports(FILES, deferred=True)))
    # datasets is how exports are read, by people.
    assert used >= EXTRAS["train"] - {"datasets"}, sorted(EXTRAS["train"] - used)


def test_what_a_light_installation_misses_is_known_by_name():
    """`pipeline.common.needs` lists what is imported beyond the plain installation."""
    found = third_party_imports(FILES, deferred=True)
    heavy = {name for name in found if owners(name) & EXTRAS["train"]}
    assert set(TRAIN) == heavy


def test_who_needs_everything_says_so():
    extras = PROJECT["optional-dependencies"]
    for extra in set(extras) - {"train", "s3"}:
        assert any(re.match(r"latentmill\[.*\btrain\b", one) for one in extras[extra]), extra
    for path in ("Makefile", "constraints.txt"):
        installed = re.search(r"'\.\[([a-z0-9,]+)\]'", (ROOT / path).read_text())
        assert installed, path
        assert set(installed.group(1).split(",")) == set(extras), path


def test_every_dependency_is_pinned_exactly():
    pinned = {normalised(line) for line in CONSTRAINTS}
    wanted = BASE.union(*EXTRAS.values())
    assert wanted <= pinned, f"not in constraints.txt: {sorted(wanted - pinned)}"
    assert len(pinned) == len(CONSTRAINTS)


@pytest.mark.parametrize("line", CONSTRAINTS)
def test_a_pin_is_a_name_and_a_public_version(line: str):
    assert re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line)
    assert "+" not in line


def test_commit_hooks_fetch_nothing():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    for repository in hooks["repos"]:
        assert repository["repo"] == "local"
        for hook in repository["hooks"]:
            assert hook["language"] == "system"
            assert hook["entry"].startswith(".venv/bin/")


def test_the_make_targets_that_documents_promise():
    makefile = (ROOT / "Makefile").read_text()
    for target in ("setup", "demo", "docs", "test", "test-all", "soak", "check", "format"):
        rule = re.search(rf"^{target}:(.*?)##", makefile, re.MULTILINE)
        assert rule, target
        # each sets up .venv by itself, be it by way of another target
        assert rule.group(1).strip() in ("$(STAMP)", "check"), target
