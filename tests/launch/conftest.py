"""What the launchers print, for the tests beside this file."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.__main__ import main
from tests.launch.texts import PATCH, TEXTS
from tests.processes import ROOT


@pytest.fixture
def text_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], str]:
    """What the launcher prints for a line of TEXTS."""
    monkeypatch.chdir(ROOT)
    config = tmp_path / "Denoising_VAE.yaml"
    config.write_text("# A comment that travels, too.\nrun_dir: runs/vae\nseed: 1\n")
    patch = tmp_path / "patch.yaml"
    patch.write_text(PATCH)

    def text(name: str) -> str:
        files = {"{config}": str(config), "{patch}": str(patch)}
        argv = [files.get(word, word) for word in TEXTS[name]]
        assert main(argv) == 0
        printed = capsys.readouterr().out.replace(sys.executable, "/venv/bin/python")
        return printed.replace(str(ROOT), "/latentmill")

    return text
