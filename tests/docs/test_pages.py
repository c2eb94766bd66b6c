"""The pages do what they say: every block is run, in the order of its page, or says why not.

The first hour begins with nothing but photos; the other pages of docs/ begin with what it leaves.
README.md is typed where only the wheel is installed: tests/project/test_wheel.py.
"""

import contextlib
import io
import re
import shutil
from pathlib import Path

import pytest
import yaml

from launch.__main__ import parser as launch_parser
from pipeline.__main__ import build_parser
from pipeline.common import strict
from pipeline.common.arguments import parse_train
from pipeline.config import TrainConfig
from pipeline.export.settings import ExportConfig
from tests.docs.blocks import Block, blocks_of, commands
from tests.docs.reader import make_photos, make_shims, type_blocks
from tests.docs.shim import SHORT, shortened
from tests.processes import ROOT

FIRST_HOUR = ROOT / "docs" / "first_hour.md"
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
OTHERS = [page for page in PAGES[1:] if page != FIRST_HOUR]
MAX_LINES = {"README.md": 200}
MAX_PAGE_LINES = 250


@pytest.fixture(scope="session")
def shims(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("person") / "bin"
    make_shims(folder)
    return folder


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with PHOTOS and nothing else: never write here."""
    folder = tmp_path_factory.mktemp("photos")
    make_photos(folder / "PHOTOS")
    return folder


@pytest.fixture(scope="session")
def after_the_first_hour(
    photos: Path, shims: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """What the first hour leaves: never write here."""
    folder = tmp_path_factory.mktemp("first") / "hour"
    shutil.copytree(photos, folder)
    type_blocks(blocks_of(FIRST_HOUR), folder, shims)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_first_hour_leaves_what_it_says(after_the_first_hour: Path):
    for name in ("data/photos", "runs/photos", "models/photos", "exports/photos"):
        assert (after_the_first_hour / name).is_dir()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", OTHERS, ids=lambda page: page.stem)
def test_a_page_does_what_it_says(
    page: Path, after_the_first_hour: Path, tmp_path: Path, shims: Path
):
    blocks = blocks_of(page)
    if all(block.language == "text" for block in blocks):
        return
    shutil.copytree(after_the_first_hour, tmp_path / "here", symlinks=True)
    type_blocks(blocks, tmp_path / "here", shims)


def test_what_is_not_run_says_why_and_is_written_correctly(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    left_out = [b for page in PAGES for b in blocks_of(page) if "norun" in b.options]
    for block in left_out:
        if block.language == "console":
            for words in commands(block.text):
                parse(words, block)
    with capsys.disabled():
        print(f"\n{len(left_out)} blocks are not run here:")
        for block in left_out:
            print(f"  {block.where}: {block.options['norun']}")


def parse(words: list[str], block: Block) -> None:
    """Have a command's own parser read it; a wrong option fails with the parser's words."""
    for name in re.findall(r"^\w+\.yaml$", "\n".join(words), re.MULTILINE):
        Path(name).touch()  # a config of the reader's own
    output, rest = io.StringIO(), list[str]()
    try:
        with contextlib.redirect_stderr(output):
            if words[0] == "latentmill":
                _, rest = build_parser(words[1]).parse_known_args(words[1:])
            elif words[:3] == ["python", "-m", "launch"]:
                _, rest = launch_parser().parse_known_args(words[3:])
            elif "pipeline.train" in words:
                parse_train(words[words.index("pipeline.train") + 1 :])
    except SystemExit:
        pytest.fail(f"{block.where}: {output.getvalue()}")
    unknown = [word for word in rest if word.startswith("-") or "=" not in word]
    assert not unknown, f"{block.where}: unknown options {unknown}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_configs_on_a_page_are_valid(page: Path):
    base = {"run_dir": "runs/photos", "data": {"path": "data/photos"}}
    for block in blocks_of(page):
        if block.language == "yaml" and "norun" not in block.options:
            tree, problems = strict.parse(block.text)
            assert not problems, block.where
            is_export = "out" in tree
            text = yaml.safe_dump(tree if is_export else base | tree)
            strict.load(ExportConfig if is_export else TrainConfig, None, [], text=text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_is_short(page: Path):
    assert len(page.read_text().splitlines()) <= MAX_LINES.get(page.name, MAX_PAGE_LINES)


def test_only_lengths_are_cut():
    train = ["-m", "pipeline", "train", "vae", "num_steps=500", "batch_size=4", "--device", "cpu"]
    kept = [word for word in train if word != "num_steps=500"]
    assert shortened(train) == [*kept, *SHORT]
    assert shortened([*train, "--dry-run"]) == [*train, "--dry-run"]
    pack = ["-m", "pipeline", "pack", "sprites", "data/x", "--count", "20000", "--json"]
    assert shortened(pack) == [*pack[:6], "600", "--json"]
    other = ["-m", "pipeline", "evaluate", "runs/photos"]
    assert shortened(other) == other
