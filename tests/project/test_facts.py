"""docs/facts.md: every fact names a test, and every test that it names exists."""

import ast
import re
from functools import cache

from tests.processes import ROOT

PAGE = ROOT / "docs/facts.md"
TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


@cache
def named_in(file: str) -> set[str]:
    """The names of the tests in a file; empty if there is no such file."""
    path = ROOT / file
    tree = ast.parse(path.read_text() if path.is_file() else "")
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_fact_names_tests_that_exist():
    facts = re.split(r"^- ", PAGE.read_text(), flags=re.MULTILINE)[1:]
    assert len(facts) > 30
    without = [fact.partition("\n")[0] for fact in facts if not TEST.search(fact)]
    assert not without, "facts without a test"
    named = [match.groups() for match in TEST.finditer(PAGE.read_text())]
    gone = [f"{file}::{test}" for file, test in named if test not in named_in(file)]
    assert not gone, "tests that are no longer there"
