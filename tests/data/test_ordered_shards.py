"""The source stage for webdataset pipelines: our order, anyone's stages, exact resume."""

import gc
import json
import os
import shutil
import threading
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import webdataset as wds
from torch.utils.data import DataLoader

from pipeline.common.errors import UserError
from pipeline.data.decode import ImageDecode
from pipeline.data.index import Index, build_index
from pipeline.data.ordered_shards import OrderedShards
from pipeline.data.settings import DataConfig
from tests.processes import open_files
from tests.shards import TINY_COUNTS, open_stream

NUMBERS = {"lanes": 4, "interleave": 3, "window": 5}
G = 8
TOTAL = sum(TINY_COUNTS)


def source(shards: Path | str, **changes) -> OrderedShards:
    return OrderedShards(shards, **({"batch_size": G, "seed": 5} | NUMBERS | changes))


def keys_of_source(shards: Path, num: int, **changes) -> list[str]:
    samples = iter(source(shards, **changes))
    return [next(samples)["__key__"] for _ in range(num)]


def keys_of_stream(shards: Path, steps: range, *, rank: int, world: int, **changes) -> list[str]:
    data = DataConfig(path=str(shards), split="all", decode=ImageDecode(size=8), **NUMBERS)
    with open_stream(
        data.model_copy(update=changes),
        index=Index.open(shards),
        seed=5,
        batch_size=G,
        first_step=steps.start,
        num_steps=len(steps),
        rank=rank,
        world=world,
    ) as stream:
        return [key for batch in stream for key in batch.keys]


@pytest.mark.parametrize("split", ["all", "held_out"])
@pytest.mark.parametrize("world", [1, 2, 8])
def test_keys_come_as_from_our_own_stream(tiny_shards: Path, world: int, split: str):
    for rank in range(world):
        ranks = {"rank": rank, "world": world, "split": split}
        expected = keys_of_stream(tiny_shards, range(20), **ranks)  # more than an epoch
        assert keys_of_source(tiny_shards, len(expected), **ranks) == expected


@pytest.mark.parametrize("worlds", [(1, 2), (2, 1), (2, 8), (2, 2)])
def test_resume_in_mid_epoch_goes_on_as_our_own_stream(tiny_shards: Path, worlds: tuple[int, int]):
    before, after = worlds
    states = []
    for rank in range(before):
        stopped = source(tiny_shards, rank=rank, world=before)
        samples = iter(stopped)
        keys = [next(samples)["__key__"] for _ in range(3 * G // before)]
        assert keys == keys_of_stream(tiny_shards, range(3), rank=rank, world=before)
        states.append(json.loads(json.dumps(stopped.state_dict())))
    assert all(state == states[0] for state in states)
    assert states[0]["T"] == 3 * G
    for rank in range(after):
        resumed = source(tiny_shards, rank=rank, world=after)
        resumed.load_state_dict(states[0])
        samples = iter(resumed)
        keys = [next(samples)["__key__"] for _ in range(9 * G // after)]
        assert keys == keys_of_stream(tiny_shards, range(3, 12), rank=rank, world=after)


@pytest.mark.parametrize("tail", ["carry", "drop"])
@pytest.mark.parametrize("world", [1, 4])
def test_a_stop_after_any_sample_loses_and_repeats_none(tiny_shards: Path, world: int, tail: str):
    options = {"rank": world - 1, "world": world, "tail": tail, "epochs": 2, "split": "train"}
    whole = [sample["__key__"] for sample in source(tiny_shards, **options)]
    epoch, end = len(whole) // 2, len(whole)
    for stop in sorted({*range(0, end, 7), epoch - 1, epoch, epoch + 1, end - 1, end}):
        stopped = source(tiny_shards, **options)
        samples = iter(stopped)
        keys = [next(samples)["__key__"] for _ in range(stop)]
        state = stopped.state_dict()
        assert state == source(tiny_shards, **options).state_dict(consumed=stop)
        resumed = source(tiny_shards, **options)
        resumed.load_state_dict(state)
        assert keys + [sample["__key__"] for sample in resumed] == whole
        assert resumed.state_dict()["T"] == 2 * resumed.order.epoch_length


def test_epochs_give_every_sample_once_and_can_be_extended(tiny_shards: Path):
    for epochs in (1, 3):
        found = Counter()
        for rank in range(2):
            options = {"rank": rank, "world": 2, "batch_size": 14, "lanes": 7}
            first = source(tiny_shards, epochs=1, **options)
            found.update(sample["__key__"] for sample in first)
            more = source(tiny_shards, epochs=epochs, **options)
            more.load_state_dict(first.state_dict())
            found.update(sample["__key__"] for sample in more)
        assert len(found) == TOTAL
        assert set(found.values()) == {epochs}


def test_drop_gives_all_ranks_the_same_number(tiny_shards: Path):
    options = {"world": 2, "batch_size": 14, "lanes": 7, "tail": "drop", "epochs": 2}
    counts = [len(list(source(tiny_shards, rank=rank, **options))) for rank in range(2)]
    assert counts == [2 * (TOTAL // 14) * 7] * 2


def test_iterating_again_goes_on(tiny_shards: Path):
    ordered = source(tiny_shards)
    keys = [sample["__key__"] for _ in range(2) for sample in islice(ordered, 7)]
    assert keys == keys_of_source(tiny_shards, 14)


@pytest.mark.filterwarnings("ignore:unclosed file")  # webdataset leaves its shards to the collector
@pytest.mark.filterwarnings("ignore:Exception ignored in.*FileIO")
def test_samples_are_those_of_webdataset_itself(tiny_shards: Path):
    pattern = f"{tiny_shards}/tiny-{{0000..0004}}.tar"
    theirs = {sample["__key__"]: sample for sample in wds.WebDataset(pattern, shardshuffle=False)}
    ours = {sample["__key__"]: sample for sample in source(pattern, epochs=1)}
    assert ours == theirs


def test_decoders_maps_and_batching_of_webdataset_work_unchanged(tiny_shards: Path):
    def pipeline(ordered: OrderedShards) -> wds.DataPipeline:
        return wds.DataPipeline(
            ordered,
            wds.decode("rgb8"),
            wds.map(lambda sample: sample | {"sum": int(sample["png"].sum(dtype="int64"))}),
            wds.to_tuple("__key__", "png", "cls", "json", "sum"),
            wds.batched(G, partial=False),
        )

    ordered = source(tiny_shards)
    batches = list(islice(pipeline(ordered), 3))
    keys = [key for batch in batches for key in batch[0]]
    assert keys == keys_of_stream(tiny_shards, range(3), rank=0, world=1)
    for names, images, classes, records, sums in batches:
        assert images.shape == (G, 32, 32, 3)
        assert images.sum(axis=(1, 2, 3), dtype="int64").tolist() == sums.tolist()
        numbers = [record["number"] for record in records]
        assert [f"{number:06d}" for number in numbers] == names
        assert classes.tolist() == [number % 3 for number in numbers]


def test_a_loop_over_batches_counts_what_it_used(tiny_shards: Path):
    def batches(ordered: OrderedShards):
        return wds.DataPipeline(ordered, wds.to_tuple("__key__"), wds.batched(G))

    first, second = source(tiny_shards), source(tiny_shards)
    used = [keys for (keys,) in islice(batches(first), 4)]
    assert first.state_dict()["taken"] == 1  # wds.batched has asked for one more
    second.load_state_dict(first.state_dict(consumed=4 * G))
    used += [keys for (keys,) in islice(batches(second), 4)]
    assert [key for keys in used for key in keys] == keys_of_source(tiny_shards, 8 * G)


def test_pil_images_and_an_epoch_of_webdataset(tiny_shards: Path):
    stages = (wds.decode("pil"), wds.to_tuple("__key__", "png"))
    pipeline = wds.DataPipeline(source(tiny_shards), *stages).with_epoch(5)
    first, second = list(pipeline), list(pipeline)
    assert [image.size for _, image in first] == [(32, 32)] * 5
    assert [key for key, _ in [*first, *second]] == keys_of_source(tiny_shards, 10)


@pytest.mark.parametrize("method", [None, "fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_a_dataloader_gives_the_same_order_and_resumes(tiny_shards: Path, method: str | None):
    ordered = source(tiny_shards, epochs=1)
    workers = {} if method is None else {"num_workers": 1, "multiprocessing_context": method}
    loader = DataLoader(ordered, batch_size=None, **workers)
    expected = [sample["__key__"] for sample in source(tiny_shards, epochs=1)]
    used = [sample["__key__"] for sample in islice(loader, 20)]
    if method is not None:
        with pytest.raises(UserError, match="consumed=N"):
            ordered.state_dict()
    resumed = source(tiny_shards, epochs=1)
    resumed.load_state_dict(ordered.state_dict(consumed=20))
    used += [sample["__key__"] for sample in DataLoader(resumed, batch_size=None, **workers)]
    assert used == expected


@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes")
def test_two_workers_are_refused_with_the_reason(
    tiny_shards: Path, monkeypatch: pytest.MonkeyPatch
):
    # How long torch waits for a worker to end after an error, which none does by itself.
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.1)
    loader = DataLoader(source(tiny_shards), batch_size=None, num_workers=2)
    batches = iter(loader)
    with pytest.raises(UserError, match="every worker would read all bytes"):
        next(batches)
    batches._shutdown_workers()


def test_a_persistent_worker_is_refused_when_it_begins_again(
    tiny_shards: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.1)
    loader = DataLoader(
        source(tiny_shards), batch_size=None, num_workers=1, persistent_workers=True
    )
    assert len(list(islice(loader, 5))) == 5
    with pytest.raises(UserError, match="leave persistent_workers out"):
        list(islice(loader, 5))
    assert loader._iterator is not None
    loader._iterator._shutdown_workers()


def test_the_data_state_of_a_run_will_do(tiny_shards: Path):
    ordered = source(tiny_shards)
    run = {"T": 5 * G, "order_id": ordered.order.order_id, "dataset_id": ordered.order.dataset_id}
    ordered.load_state_dict(run)
    keys = [sample["__key__"] for sample in islice(ordered, 3 * G)]
    assert keys == keys_of_stream(tiny_shards, range(5, 8), rank=0, world=1)
    with pytest.raises(UserError, match="order_id is None"):
        ordered.load_state_dict({"T": 0})


def test_a_state_of_another_stream_is_refused_and_both_are_shown(tiny_shards: Path):
    ours, theirs = source(tiny_shards), source(tiny_shards, window=6)
    with pytest.raises(UserError) as refused:
        ours.load_state_dict(theirs.state_dict())
    assert ours.order.order_id in str(refused.value)
    assert theirs.order.order_id in str(refused.value)
    with pytest.raises(UserError, match="tail is drop, here it is carry"):
        ours.load_state_dict(source(tiny_shards, tail="drop").state_dict())


def test_other_ranks_cannot_go_on_within_a_step(tiny_shards: Path):
    state = source(tiny_shards, rank=0, world=2).state_dict(consumed=5)
    with pytest.raises(UserError, match="multiple of 4 samples per rank"):
        source(tiny_shards).load_state_dict(state)
    with pytest.raises(UserError, match="T = 8 is no multiple of batch_size = 12"):
        source(tiny_shards, batch_size=12).load_state_dict(
            source(tiny_shards).state_dict(consumed=8)
        )


def test_an_old_iterator_ends_when_a_state_is_loaded(tiny_shards: Path):
    ordered = source(tiny_shards)
    samples = iter(ordered)
    next(samples)
    ordered.load_state_dict(ordered.state_dict())
    with pytest.raises(RuntimeError, match="ended"):
        next(samples)


def test_mistakes_are_user_errors(
    tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(UserError, match="lanes = 3 does not divide"):
        source(tiny_shards, lanes=3)
    with pytest.raises(UserError, match="batch_size = 8 does not divide over world = 3"):
        source(tiny_shards, rank=0, world=3)
    with pytest.raises(UserError, match="0 <= rank < world"):
        source(tiny_shards, rank=2, world=2)
    with pytest.raises(UserError, match="epochs = 0"):
        source(tiny_shards, epochs=0)
    with pytest.raises(UserError, match="the index has the splits held_out, train, all"):
        source(tiny_shards, split="test")
    with pytest.raises(UserError, match="names 2 shards, the index in .* has 5"):
        source(f"{tiny_shards}/tiny-{{0000..0001}}.tar")
    with pytest.raises(UserError, match=f"run `latentmill index {tmp_path}`"):
        source(tiny_shards, index=tmp_path)
    shutil.copy(tiny_shards / "tiny-0000.tar", tmp_path)
    with pytest.raises(UserError, match=f"run `latentmill index {tmp_path}`"):
        source(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="WORLD_SIZE = 2 processes"):
        source(tiny_shards)


def test_a_part_of_the_shards_with_an_index_of_its_own(tiny_shards: Path, tmp_path: Path):
    pattern = f"{tiny_shards}/tiny-{{0000..0001}}.tar"
    build_index(pattern, out=tmp_path)
    keys = [sample["__key__"] for sample in source(pattern, index=tmp_path, epochs=1)]
    assert sorted(keys) == [f"{number:06d}" for number in range(sum(TINY_COUNTS[:2]))]


def test_a_shard_that_shrinks_ends_the_iteration_and_its_threads(tiny_shards: Path, tmp_path: Path):
    shutil.copytree(tiny_shards, tmp_path / "s")
    ordered = source(tmp_path / "s", epochs=1)
    os.truncate(tmp_path / "s" / "tiny-0003.tar", 4096)
    with pytest.raises(OSError, match=r"tiny-0003.tar ends at byte 4096"):
        list(ordered)
    gc.collect()
    assert not [t for t in threading.enumerate() if t.name.startswith("raw-read")]


def test_a_dropped_iterator_stops_its_threads_and_closes_its_files(tiny_shards: Path):
    samples = iter(source(tiny_shards))
    next(samples)
    assert open_files(tiny_shards)
    del samples
    assert open_files(tiny_shards) == []
    assert not [t for t in threading.enumerate() if t.name.startswith("raw-read")]
