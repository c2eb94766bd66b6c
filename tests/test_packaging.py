"""What is imported is declared, what is declared is pinned, and nothing points at one machine."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml

from tests.processes import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONSTRAINTS = [
    line for line in (ROOT / "constraints.txt").read_text().splitlines() if line[:1] not in "#"
]


def normalised(requirement: str) -> str:
    return re.split(r"[<>=!~\[; ]", requirement)[0].lower().replace("_", "-")


# pydantic pins the one version of its core that it works with, and re-exports only parts of it.
COMES_WITH = {"pydantic-core": "pydantic"}
DECLARED = {normalised(requirement) for requirement in PROJECT["dependencies"]}


def third_party_imports(path: Path) -> set[str]:
    tops: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            tops |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            tops.add(node.module.split(".")[0])
    return tops - set(sys.stdlib_module_names) - {"pipeline", "launch", "_typeshed"}


def test_every_import_is_a_declared_dependency():
    distributions = packages_distributions()
    for path in [*(ROOT / "pipeline").rglob("*.py"), *(ROOT / "launch").rglob("*.py")]:
        for name in third_party_imports(path):
            owners = {normalised(owner) for owner in distributions.get(name, [name])}
            owners = {COMES_WITH.get(owner, owner) for owner in owners}
            assert owners & DECLARED, f"{path.relative_to(ROOT)} imports {name}: not declared"


def test_every_dependency_is_used():
    names: set[str] = set()
    for path in [*(ROOT / "pipeline").rglob("*.py"), *(ROOT / "launch").rglob("*.py")]:
        names |= third_party_imports(path)
    distributions = packages_distributions()
    used = {normalised(owner) for name in names for owner in distributions.get(name, [])}
    # fsspec reads object stores; datasets is how exports are read, by the demo and by people.
    assert used >= DECLARED - {"datasets", "fsspec"}, sorted(DECLARED - used)


def test_every_dependency_is_pinned_exactly():
    pinned = {normalised(line) for line in CONSTRAINTS}
    extras = PROJECT["optional-dependencies"].values()
    wanted = DECLARED | {normalised(one) for extra in extras for one in extra}
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
    for target in ("setup", "demo", "test", "test-all", "soak", "check", "format"):
        rule = re.search(rf"^{target}:(.*?)##", makefile, re.MULTILINE)
        assert rule, target
        # each sets up .venv by itself, be it by way of another target
        assert rule.group(1).strip() in ("$(STAMP)", "check"), target
