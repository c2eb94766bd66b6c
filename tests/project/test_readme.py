"""The documents agree with the tree: links lead somewhere, the file map is complete."""

import re
import subprocess
from pathlib import Path

import pytest

from tests.processes import ROOT

DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "LOG.md"]
LINK = re.compile(r"(?<!`)\[[^\]]*\]\(([^)\s]+)\)")
IMAGE_TAG = re.compile(r"<img[^>]*src=\"([^\"]+)\"")
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
# In the map a package may stand for its files; every file of these must be named or covered.
MAPPED = ("pipeline", "launch", "configs", "benchmarks", "docker", "examples")


def tracked() -> set[str]:
    """What git tracks or would track: the tree without what .gitignore names."""
    argv = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    ended = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    if ended.returncode:
        pytest.skip("not a git checkout: the file map has nothing to be compared with")
    return {name for name in ended.stdout.splitlines() if (ROOT / name).is_file()}


def anchor(heading: str) -> str:
    """The anchor that a heading gets on a web page."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path):
    text = document.read_text()
    for target in [*LINK.findall(text), *IMAGE_TAG.findall(text)]:
        if re.match(r"[a-z]+:", target):
            continue  # another place: not ours to check
        name, _, fragment = target.partition("#")
        path = document.parent / name if name else document
        assert path.exists(), target
        if fragment:
            headings = {anchor(heading) for heading in HEADING.findall(path.read_text())}
            assert fragment in headings, target


def file_map() -> dict[str, str]:
    """path -> what, from the fenced block below the heading "File map" of the README."""
    text = (ROOT / "README.md").read_text()
    section = re.search(r"^#+ File map$.*?^```\w*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert section, "README.md has no fenced block below a heading `File map`"
    lines = [line for line in section.group(1).splitlines() if line.strip()]
    entries = [line.split(maxsplit=1) for line in lines]
    for line, entry in zip(lines, entries, strict=True):
        assert len(entry) == 2, f"no `path  what`: {line!r}"
        assert not line.startswith(" "), f"paths are written in full: {line!r}"
    assert len({path for path, _ in entries}) == len(entries), "a path stands there twice"
    return dict(entries)  # type: ignore[arg-type]


def test_the_file_map_names_what_exists():
    for path in file_map():
        assert list(ROOT.glob(path.rstrip("/"))), f"{path} is in the file map, not in the tree"


def test_the_file_map_names_every_file():
    named = file_map()
    covered = {
        str(found.relative_to(ROOT)) for path in named for found in ROOT.glob(path.rstrip("/"))
    }
    missing = [
        name
        for name in sorted(tracked())
        if name.split("/")[0] in MAPPED
        and not name.endswith(("/__init__.py", "py.typed"))
        and name not in covered
        and not any(
            parent.as_posix() in covered and f"{parent.as_posix()}/" in named
            for parent in Path(name).parents
        )
    ]
    assert not missing, f"not in the file map of README.md: {missing}"


def test_the_documents_name_modules_that_exist():
    """`pipeline/x.py` or `-m pipeline.x` in a document is a file of ours."""
    for document in DOCUMENTS:
        text = document.read_text()
        if document.name == "LOG.md":
            continue  # a record of what was
        for name in re.findall(r"\b((?:pipeline|launch|tests|configs)/[\w/.-]*\w)", text):
            if not re.search(r"KIND|NAME|TESTS|test_x", name):
                assert (ROOT / name).exists(), f"{document.name}: {name}"
        for module in re.findall(r"-m ((?:pipeline|launch)[\w.]*)", text):
            base = ROOT / module.replace(".", "/").rstrip("/")
            found = base.with_suffix(".py").is_file() or (base / "__main__.py").is_file()
            assert found, f"{document.name}: {module}"
