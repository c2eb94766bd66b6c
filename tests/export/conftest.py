"""One small data set, run and finished export for all tests of the export."""

from pathlib import Path

import pytest

from tests.export import world


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packed sprites; not to be changed."""
    return world.make_data(tmp_path_factory.mktemp("data") / "sprites")


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A run with two checkpoints of a small Gaussian model."""
    model = {"bottleneck": {"kind": "gaussian", "size": 3}}
    return world.make_run(tmp_path_factory.mktemp("run"), data, model)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, run_dir: Path) -> Path:
    """An export in both formats that nothing interrupted; not to be changed."""
    out = tmp_path_factory.mktemp("finished") / "out"
    assert world.run_export(world.make_config(run_dir, out)) == 0
    return out
