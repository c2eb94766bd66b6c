"""One tiny run and export for all tests of the package."""

from pathlib import Path

import pytest

import latentmill as lm
from tests.latentmill.world import World, make_world


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("latentmill"))


@pytest.fixture(scope="session")
def model(world: World) -> lm.LoadedModel:
    return lm.load(world.model)


@pytest.fixture
def files(world: World) -> list[Path]:
    """The photos in the order of the export's rows."""
    return [world.photos / name for name in lm.LatentDataset(world.export).column("path")]
