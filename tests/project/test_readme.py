"""The documents agree with the tree: links resolve, the house shows its folders and wings."""

import re
import subprocess
from pathlib import Path

import pytest

from tests.processes import ROOT
from tests.project.test_layers import LEVEL_OF

LOG = ROOT / "LOG.md"
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", LOG, *sorted(ROOT.glob("docs/*.md"))]
LINK = re.compile(r"(?<!`)\[[^\]]*\]\(([^)\s]+)\)")
IMAGE_TAG = re.compile(r"<img[^>]*src=\"([^\"]+)\"")
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
MAX_HOUSE_LINES = 35


def tracked(*folders: str) -> set[str]:
    """The files below some folders (none: below all) that .gitignore does not name."""
    argv = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *folders]
    ended = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    if ended.returncode:
        pytest.skip("not a git checkout: what belongs to the tree is not known")
    return {name for name in ended.stdout.splitlines() if (ROOT / name).is_file()}


def anchor(heading: str) -> str:
    """The anchor of a heading, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path):
    text = document.read_text()
    for target in [*LINK.findall(text), *IMAGE_TAG.findall(text)]:
        if re.match(r"[a-z]+:", target):
            continue  # another site, which is not checked
        name, _, fragment = target.partition("#")
        path = document.parent / name if name else document
        assert path.exists(), target
        if fragment:
            headings = {anchor(heading) for heading in HEADING.findall(path.read_text())}
            assert fragment in headings, target


def house() -> dict[str, list[str]]:
    """Folder -> the names that the block below the heading "The house" has for it, in order."""
    text = (ROOT / "README.md").read_text()
    section = re.search(r"^## The house$.*?^```text\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert section, "README.md has no fenced block below a heading `The house`"
    lines = section.group(1).splitlines()
    assert len(lines) <= MAX_HOUSE_LINES
    named: dict[str, list[str]] = {"": []}
    for line in lines:
        entry = re.fullmatch(r"(  )?(\S+) +\S.*", line)
        assert entry, f"no `name  what`: {line!r}"
        folder = named[""][-1] if entry[1] else ""
        named.setdefault(folder, []).append(entry[2])
    return named


def test_the_house_has_every_folder_and_nothing_else():
    tops = {f"{name.split('/')[0]}/" for name in tracked() if "/" in name}
    assert sorted(house()[""]) == sorted(tops)


def test_the_house_has_every_wing_in_the_order_of_the_spine():
    inside = {name.split("/")[1] + "/" * (name.count("/") > 1) for name in tracked("pipeline")}
    wings = house()["pipeline/"]
    assert sorted(wings) == sorted(inside - {"__init__.py", "py.typed"})
    levels = [LEVEL_OF[name.removesuffix("/").removesuffix(".py")] for name in wings]
    assert levels == sorted(levels, reverse=True), "from high to low, as SPINE has them"


def test_the_documents_run_modules_that_exist():
    """The module after each `python -m` in a document exists."""
    for document in DOCUMENTS:
        if document == LOG:  # a record of what was
            continue
        for module in re.findall(
            r"-m ((?:pipeline|launch|benchmarks)[\w.]*\w)", document.read_text()
        ):
            base = ROOT / module.replace(".", "/")
            found = base.with_suffix(".py").is_file() or (base / "__main__.py").is_file()
            assert found, f"{document.name}: {module}"
