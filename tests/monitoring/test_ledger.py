"""The ledger: counts every sample; its digest is the same for any number of processes."""

import json

import pytest

from pipeline.data.index import build_index
from pipeline.data.index.splits import SplitSpec
from pipeline.data.settings import DataConfig
from pipeline.data.stream.account import Account
from pipeline.data.stream.datasets import open_indexes
from pipeline.distributed.runtime import Runtime
from pipeline.monitoring.ledger import Ledger
from pipeline.train import train
from tests.config.runs import BASE, World
from tests.config.runs import write_shards as write_run_shards
from tests.data.streams import IMAGES, SEED, write_shards
from tests.shards import open_stream

COUNTS = (9, 14, 5)  # 28 samples, of which batches of 8 leave a carry
BROKEN = {3: {"jpg": b"no picture", "png": b"no picture", "webp": b"no picture"}}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> DataConfig:
    folder = tmp_path_factory.mktemp("ledger") / "shards"
    write_shards(folder, COUNTS, BROKEN)
    split = SplitSpec(fractions={"train": 0.7, "held_out": 0.3})
    build_index(folder, split=split)
    return DataConfig(path=str(folder), split="all", decode=IMAGES, lanes=4, window=3)


def ledgers_of(data, *, first_step, num_steps):
    """The values after each step of one process."""
    runtime = Runtime.start(accumulation=1)
    indexes = open_indexes(data)
    options = {"index": indexes, "seed": SEED, "batch_size": 8}
    with open_stream(data, first_step=first_step, num_steps=num_steps, **options) as stream:
        ledger = Ledger(stream, indexes, split=data.split, prefetch=data.prefetch, runtime=runtime)
        found = []
        for _ in stream:
            found.append(ledger.read())
            assert len(stream.account.epochs) <= 2  # counts of complete epochs are dropped
            ledger.check_against_plan()
        return found


def test_epochs_balance_with_tombstones_and_what_an_earlier_start_delivered(data):
    values = ledgers_of(data, first_step=2, num_steps=9)  # T from 16 to 88: ends of epochs 0, 1, 2
    books = [v for v in values if "data/ledger/epoch" in v]
    assert [v["data/ledger/epoch"] for v in books] == [0, 1, 2]
    for book in books:
        usable, tombstones = book["data/ledger/usable"], book["data/ledger/tombstones"]
        assert usable + tombstones + book["data/ledger/carried"] == 28
    assert [v["data/ledger/carried"] for v in books] == [16, 0, 0]
    assert [v["data/ledger/tombstones"] for v in books][1:] == [1, 1]


def test_the_digest_of_steps_does_not_depend_on_where_a_run_was_cut(data):
    whole = [v["data/order_digest"] for v in ledgers_of(data, first_step=0, num_steps=8)]
    parts = [
        v["data/order_digest"]
        for first, num in ((0, 3), (3, 5))
        for v in ledgers_of(data, first_step=first, num_steps=num)
    ]
    assert parts == whole
    assert len(set(whole)) == 8
    other = data.model_copy(update={"window": 2})
    assert [v["data/order_digest"] for v in ledgers_of(other, first_step=0, num_steps=8)] != whole


def test_of_batches_taken_ahead_only_the_used_are_in_the_books(data):
    """As on a GPU: when a step is logged, one more batch is being copied."""
    options = {"index": open_indexes(data), "seed": SEED, "batch_size": 8, "num_steps": 5}
    with open_stream(data, **options) as plain, open_stream(data, **options) as early:
        early.account = Account(0, 0, ahead=1)
        next(early)
        for _ in plain:
            next(early, None)
            for name in ("next_step", "digest", "last_digest", "epochs"):
                assert getattr(early.account, name) == getattr(plain.account, name)
        assert plain.account.next_step == 5


def test_a_process_that_reads_another_split_is_found(data):
    """The order of one split with the stream of another."""
    runtime, indexes = Runtime.start(accumulation=1), open_indexes(data)
    train_only = data.model_copy(update={"split": "train"})
    with open_stream(train_only, index=indexes, seed=SEED, batch_size=8, num_steps=3) as stream:
        ledger = Ledger(stream, indexes, split="all", prefetch=2, runtime=runtime)
        ledger.check_against_plan()  # nothing was delivered yet
        next(stream)
        with pytest.raises(RuntimeError, match=r"step 0: the samples .* not those of the order"):
            ledger.check_against_plan()


def test_what_a_process_did_not_deliver_is_missed(data):
    """One of two processes counts alone."""
    runtime, indexes = Runtime.start(accumulation=1), open_indexes(data)
    options = {"index": indexes, "seed": SEED, "batch_size": 8, "world": 2}
    with open_stream(data, num_steps=4, **options) as stream:
        ledger = Ledger(stream, indexes, split="all", prefetch=2, runtime=runtime)
        for _ in range(3):
            next(stream)
        ledger.read()  # 24 of 28 samples: no epoch is complete yet
        with pytest.raises(RuntimeError, match="not those of the order"):
            ledger.check_against_plan()
        next(stream)
        with pytest.raises(RuntimeError, match="epoch 0 .* do not add up"):
            ledger.read()


def test_a_run_logs_what_its_stream_did(tmp_path):
    write_run_shards(tmp_path / "shards")
    world = World(tmp_path / "shards", tmp_path)
    config = world.config(("num_steps=12",))
    train(config)
    lines = (tmp_path / "0" / "metrics.jsonl").read_text().splitlines()
    logs = [json.loads(line) for line in lines if "train/loss" in line]
    names = ("order_digest", "ready_batches", "bytes_per_second", "read_amplification")
    names += ("retries", "reopened", "decode_ms_p50", "decode_ms_p95", "tombstones", "images")
    for record in logs:
        assert all(f"data/{name}" in record for name in names)
        assert 0 <= record["data/ready_batches"] <= 1
        assert record["data/decode_ms_p50"] <= record["data/decode_ms_p95"]
    assert logs[-1]["data/read_amplification"] >= 1
    assert any("data/ledger/epoch" in record for record in logs)


@pytest.mark.distributed
def test_runs_of_any_number_of_processes_log_the_same_digests(tmp_path, run_processes):
    write_run_shards(tmp_path / "shards")
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(BASE))

    def digests(run: str, *starts: tuple[int, int]) -> list[int]:
        """Of a run in several starts: (processes, number of steps to reach)."""
        for num_processes, num_steps in starts:
            places = (f"data.path={tmp_path / 'shards'}", f"run_dir={tmp_path / run}")
            result = run_processes(
                "pipeline.train", num_processes, config, *places, f"num_steps={num_steps}"
            )
            assert result.code == 0, result.output
        lines = (tmp_path / run / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        return [r["data/order_digest"] for r in records if "data/order_digest" in r]

    alone = digests("alone", (1, 6))
    assert len(set(alone)) == 6
    assert digests("resized", (2, 4), (1, 6)) == alone
