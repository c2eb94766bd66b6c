"""A copy of the source tree, for tests that change code as a developer would."""

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.processes import ROOT


@dataclass
class House:
    """A copy of the source tree in a git repository of its own."""

    root: Path

    def write(self, path: str, text: str) -> None:
        """Add a file."""
        assert not (self.root / path).exists()
        (self.root / path).write_text(text.lstrip())

    def insert(self, path: str, *texts: tuple[str, str]) -> None:
        """Insert a text after another one that occurs once in a file."""
        content = (self.root / path).read_text()
        for behind, text in texts:
            assert content.count(behind) == 1, f"{path} has not one {behind!r}"
            content = content.replace(behind, behind + text)
        (self.root / path).write_text(content)

    def replace(self, path: str, old: str, new: str) -> None:
        """Replace a text that occurs once in a file."""
        content = (self.root / path).read_text()
        assert content.count(old) == 1, f"{path} has not one {old!r}"
        (self.root / path).write_text(content.replace(old, new))

    def touched(self) -> tuple[list[str], list[str]]:
        """Return, and print, the files that are new and that differ since the last call."""
        self._git("add", "--all")
        print("\n" + self._git("diff", "--staged", "--stat"))
        lines = self._git("diff", "--staged", "--name-status", "--no-renames").splitlines()
        self._commit()
        found = [line.split("\t") for line in lines]
        new = [path for status, path in found if status == "A"]
        return new, [path for status, path in found if status != "A"]

    def begin(self) -> None:
        """Commit the copy as it is."""
        self._git("init", "--quiet")
        self._git("add", "--all")
        self._commit()

    def _commit(self) -> None:
        who = ("-c", "user.name=tests", "-c", "user.email=tests@localhost")
        self._git(*who, "commit", "--quiet", "--message", "as it is")

    def _git(self, *arguments: str) -> str:
        argv = ["git", *arguments]
        done = subprocess.run(argv, cwd=self.root, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def latentmill(self, *arguments: object) -> str:
        """Run the copy's command line; return what it printed."""
        argv = [sys.executable, "-m", "pipeline", *map(str, arguments)]
        done = subprocess.run(argv, cwd=self.root, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout


def copy_house(root: Path) -> House:
    """Copy the packages and settings to the new folder `root`."""
    house = House(root)
    for top in ("pipeline", "launch", "configs"):
        shutil.copytree(ROOT / top, root / top, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    shutil.copy(ROOT / "pyproject.toml", root)
    house.begin()
    return house
