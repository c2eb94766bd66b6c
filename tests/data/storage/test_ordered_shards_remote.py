"""The source stage for webdataset pipelines over remote shards, also in a DataLoader's worker."""

import shutil
from itertools import islice
from pathlib import Path

import pytest
from torch.utils.data import DataLoader

from pipeline.data.ordered_shards import OrderedShards

NUMBERS = {"batch_size": 8, "seed": 5, "lanes": 4, "interleave": 3, "window": 5}


def contents(samples) -> list[tuple[str, bytes, bytes]]:
    return [(sample["__key__"], sample["png"], sample["json"]) for sample in samples]


@pytest.fixture(params=["nginx", "s3"])
def url(request: pytest.FixtureRequest, tiny_shards: Path, tmp_path: Path) -> str:
    """The URL of the tiny shards, in a store that serves a copy below `tmp_path`."""
    if request.param == "nginx":
        shutil.copytree(tiny_shards, tmp_path / "served" / "shards")
        return request.getfixturevalue("nginx")(tmp_path / "served") + "/shards"
    return request.getfixturevalue("s3")(tiny_shards, "wds")


@pytest.mark.parametrize("workers", [0, 1])
def test_remote_samples_are_the_local_ones(url: str, tiny_shards: Path, workers: int):
    local = contents(islice(OrderedShards(tiny_shards, **NUMBERS), 70))
    remote = OrderedShards(f"{url}/tiny-{{0000..0004}}.tar", index=tiny_shards, **NUMBERS)
    loader = DataLoader(remote, batch_size=None, num_workers=workers, timeout=60 * workers)
    assert contents(islice(loader, 20)) == local[:20]
    state = OrderedShards(tiny_shards, **NUMBERS).state_dict(consumed=20)
    remote.load_state_dict(state)  # a local stop goes on remotely
    assert contents(islice(loader, 50)) == local[20:]
    assert next(iter(remote))["__url__"].startswith(url)
    assert "__local_path__" not in next(iter(remote))
