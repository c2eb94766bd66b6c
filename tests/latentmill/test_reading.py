"""LatentDataset under torch's DataLoader, and as a table of pandas."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import latentmill as lm
from pipeline.common.errors import UserError
from tests.latentmill.world import World
from tests.latents.exports import make_rows, write_export

SHAPE = (2, 3, 4)


@pytest.fixture(scope="module")
def maps(tmp_path_factory: pytest.TempPathFactory) -> lm.LatentDataset:
    """Latents that are maps; some rows without label, text or metadata, some not valid."""
    shards = [make_rows(number, 20, SHAPE) for number in range(2)]
    return lm.LatentDataset(write_export(tmp_path_factory.mktemp("maps"), shards, ["npy"]))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_makes_batches_of_rows(maps: lm.LatentDataset, workers: int):
    batches = list(DataLoader(maps, batch_size=16, num_workers=workers))
    assert [len(batch["key"]) for batch in batches] == [16, 16, 8]
    assert batches[0]["mu"].shape == (16, *SHAPE)
    for name, expected in (
        ("mu", maps.column("mu")),
        ("logvar", maps.column("logvar")),
        ("label", maps.column("label")),
        ("valid", maps.column("valid")),
        ("index", np.arange(len(maps))),
    ):
        found = torch.cat([batch[name] for batch in batches]).numpy()
        assert np.array_equal(found, expected), name
        assert found.dtype == expected.dtype
    for name in ("key", "metadata", "text"):
        found = [one for batch in batches for one in batch[name]]
        assert found == [one or "" for one in maps.column(name)]


def test_a_loader_shuffles_rows(maps: lm.LatentDataset):
    generator = torch.Generator().manual_seed(0)
    (batch,) = DataLoader(maps, batch_size=40, shuffle=True, generator=generator)
    order = batch["index"].tolist()
    assert sorted(order) == list(range(40))
    assert order != sorted(order)
    assert np.array_equal(batch["mu"].numpy(), maps[order].mu)


def test_a_row_is_a_mapping_of_what_it_holds(maps: lm.LatentDataset):
    row = maps[1]
    assert list(row) == ["index", "key", "valid", "label", "metadata", "text", "mu", "logvar"]
    assert len(row) == len(list(row)) == len(dict(row))
    assert row["key"] == row.key
    assert row["mu"] is row.mu
    assert row.metadata is None
    assert row["metadata"] == ""
    with pytest.raises(KeyError):
        row["latents"]


def test_all_rows_as_a_table(maps: lm.LatentDataset):
    frame = maps.to_pandas()
    names = ["key", "label", "valid", "metadata", "text", "mu", "logvar"]
    assert frame.columns.tolist() == names
    assert len(frame) == len(maps)
    for number in (0, 7, 39):
        row, found = maps[number], frame.iloc[number]
        assert (found["key"], found["label"], found["valid"]) == (row.key, row.label, row.valid)
        assert found["text"] == row.text or (row.text is None and frame["text"].isna()[number])
        assert np.array_equal(found["mu"], row.mu)
    means = frame[frame["valid"]].groupby("label")["mu"].apply(lambda mu: np.stack(mu).mean())
    assert means.index.tolist() == [-1, 0, 1, 2, 3]


def test_a_table_has_the_columns_of_the_export(world: World):
    frame = lm.LatentDataset(world.export).to_pandas()
    assert frame.columns.tolist() == [
        *("key", "label", "valid", "metadata", "text", "path", "mu", "logvar")
    ]
    assert (frame["path"].str.rpartition(".")[0] == frame["key"]).all()


def test_without_pandas_it_says_what_to_install(world: World, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "pandas", None)  # as if it were not installed
    with pytest.raises(UserError, match="pip install pandas"):
        lm.LatentDataset(world.export).to_pandas()


def test_an_export_is_opened_by_a_path_object(world: World):
    for place in (Path(world.export), f"file://{world.export}"):
        assert len(lm.LatentDataset(place)) == len(list(world.photos.iterdir()))
