"""Bad samples: listed once each over restarts; too many of them stop every process."""

import json
from pathlib import Path

import pytest

from pipeline.common.errors import UserError
from pipeline.data.index import Index, build_index
from pipeline.data.settings import MIN_SAMPLES_JUDGED, DataConfig
from pipeline.data.stream import Stream
from pipeline.distributed.runtime import Runtime
from pipeline.monitoring.bad_samples import Quarantine
from tests.data.streams import ARRAYS, delivered, write_shards
from tests.shards import open_stream

COUNT = 40
BAD = (3, 17)


@pytest.fixture(scope="module")
def runtime() -> Runtime:
    return Runtime.start(accumulation=1)


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> Index:
    """One sample in twenty is unusable."""
    folder = tmp_path_factory.mktemp("quarantine") / "shards"
    write_shards(folder, (10, 30), {number: {"npy": b"bad"} for number in BAD})
    return build_index(folder)


def opened(index: Index, num_steps: int, batch_size: int = COUNT, first_step: int = 0) -> Stream:
    """One step is one epoch, unless a smaller batch is asked for."""
    data = DataConfig(path=str(index.path), split="all", decode=ARRAYS, window=8)
    return open_stream(
        data,
        index=index,
        seed=0,
        batch_size=batch_size,
        first_step=first_step,
        num_steps=num_steps,
    )


def limits(max_bad_fraction: float, max_bad_in_row: int = 10_000) -> DataConfig:
    return DataConfig(path="-", max_bad_fraction=max_bad_fraction, max_bad_in_row=max_bad_in_row)


def listed(run_dir: Path) -> list[dict]:
    lines = (run_dir / "quarantine.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_each_sample_is_listed_once_with_its_reason(tmp_path, index, runtime):
    quarantine = Quarantine(tmp_path, limits(1.0), runtime)
    with opened(index, num_steps=3) as stream:
        for epoch, _ in enumerate(stream, start=1):
            counts = quarantine.collect(stream)
            assert counts == {"data/tombstones": 2 * epoch, "data/images": COUNT * epoch}
            assert sorted(entry["uid"] for entry in listed(tmp_path)) == list(BAD)
    first = next(entry for entry in listed(tmp_path) if entry["uid"] == BAD[0])
    reason = first.pop("reason")
    assert reason.startswith("npy header")
    assert first == {"uid": 3, "key": "000003", "shard": "s-000.tar", "stage": "decode"}


def test_each_doubling_of_the_list_is_told(tmp_path, index, runtime, capsys):
    with opened(index, num_steps=3) as stream:
        quarantine = Quarantine(tmp_path, limits(1.0), runtime)
        for _ in stream:
            quarantine.collect(stream)
    text = f"2 samples could not be used: see {tmp_path / 'quarantine.jsonl'}"
    assert capsys.readouterr().err.count(text) == 1


def test_good_samples_write_no_list(tmp_path, index, runtime):
    with opened(index, num_steps=1, batch_size=1) as stream:
        batch = next(stream)
        assert batch.weight.tolist() == [1]
        Quarantine(tmp_path, limits(0.0), runtime).collect(stream)
    assert list(tmp_path.iterdir()) == []


def test_a_restart_lists_only_what_is_new(tmp_path, index, runtime):
    """Each step is a run of its own, as if every one had been preempted."""
    for step in range(12):
        with opened(index, num_steps=1, batch_size=10, first_step=step) as stream:
            next(stream)
            Quarantine(tmp_path, limits(1.0), runtime).collect(stream)
    assert sorted(entry["uid"] for entry in listed(tmp_path)) == list(BAD)


def test_half_a_line_is_cut_when_the_next_is_written(tmp_path, index, runtime):
    """Not where it was seen: an evaluation that began then would cut what the training wrote."""
    path = tmp_path / "quarantine.jsonl"
    path.write_bytes(b'{"uid": 99}\n{"uid": 9')
    early = Quarantine(tmp_path, limits(1.0), runtime)
    path.write_bytes(b'{"uid": 99}\n{"uid": 98}\n')
    with opened(index, num_steps=1) as stream:
        next(stream)
        early.collect(stream)
    assert sorted(entry["uid"] for entry in listed(tmp_path)) == [*BAD, 98, 99]


@pytest.mark.parametrize("num_bytes", [1, 20, -1])
def test_half_a_line_from_a_kill_is_written_again(tmp_path, index, runtime, num_bytes):
    with opened(index, num_steps=1) as stream:
        next(stream)
        Quarantine(tmp_path, limits(1.0), runtime).collect(stream)
    whole = (tmp_path / "quarantine.jsonl").read_bytes()
    first, second = whole.splitlines(keepends=True)
    (tmp_path / "quarantine.jsonl").write_bytes(first + second[:num_bytes])
    for _ in range(2):
        with opened(index, num_steps=1) as stream:
            next(stream)
            Quarantine(tmp_path, limits(1.0), runtime).collect(stream)
        assert (tmp_path / "quarantine.jsonl").read_bytes() == whole


def run_until_stopped(index: Index, quarantine: Quarantine, num_steps: int) -> tuple[int, str]:
    """Return the number of steps and the message that ended them."""
    with opened(index, num_steps) as stream:
        for step, _ in enumerate(stream, start=1):
            try:
                quarantine.collect(stream)
            except UserError as error:
                return step, str(error)
    return num_steps, ""


@pytest.mark.parametrize("bound", [0.0, 0.004, 0.01])
def test_the_bound_is_taken_of_a_thousand_samples_at_least(tmp_path, index, runtime, bound):
    allowed = bound * MIN_SAMPLES_JUDGED
    expected = next(step for step in range(1, 100) if 2 * step > allowed)
    assert expected * COUNT < MIN_SAMPLES_JUDGED
    step, message = run_until_stopped(index, Quarantine(tmp_path, limits(bound), runtime), 100)
    assert step == expected
    assert message.startswith(f"{2 * step} of {COUNT * step} samples could not be used: more than")
    assert f"data.max_bad_fraction {bound:g} allows" in message
    assert str(tmp_path / "quarantine.jsonl") in message
    assert len(listed(tmp_path)) == 2  # with those that stopped the run


def test_beyond_a_thousand_samples_the_fraction_itself_counts(tmp_path, index, runtime):
    num_steps = 2 * MIN_SAMPLES_JUDGED // COUNT
    within = run_until_stopped(index, Quarantine(tmp_path, limits(0.05), runtime), num_steps)
    assert within == (num_steps, "")
    # The first 1000 samples hold 50 tombstones; 49 are allowed of them.
    step, _ = run_until_stopped(index, Quarantine(tmp_path, limits(0.049), runtime), num_steps)
    assert step == MIN_SAMPLES_JUDGED // COUNT


def test_too_many_in_a_row_stop_the_run_whatever_the_fraction(tmp_path, runtime):
    """One shard of three is all bad, and nothing is shuffled: seven in a row, over batches."""
    write_shards(tmp_path / "shards", (5, 7, 20), {n: {"npy": b"bad"} for n in range(5, 12)})
    index = build_index(tmp_path / "shards")
    data = DataConfig(
        path=str(index.path), split="all", decode=ARRAYS, lanes=1, interleave=1, window=1
    )

    def run(max_bad_in_row: int) -> str:
        quarantine = Quarantine(tmp_path, limits(1.0, max_bad_in_row), runtime)
        with open_stream(data, index=index, seed=0, batch_size=4, num_steps=8) as stream:
            for _ in stream:
                quarantine.collect(stream)
            assert stream.counters.bad_in_row in (0, 7)  # 7 if the bad shard came last
        return "no error"

    assert run(7) == "no error"
    with pytest.raises(UserError, match=r"in a row could not .* than data.max_bad_in_row 6"):
        run(6)


@pytest.mark.distributed
def test_bad_samples_of_one_process_stop_all_together(tmp_path, run_processes):
    """Only the second process has bad samples; the first must not wait for it for ever."""
    write_shards(tmp_path / "good", (12,))
    slots = delivered(build_index(tmp_path / "good"), num_steps=1, decode=ARRAYS)
    bad = {slot.uid for slot in slots if slot.slot >= 6 and slot.slot % 2}
    write_shards(tmp_path / "bad", (12,), {uid: {"npy": b"bad"} for uid in bad})
    build_index(tmp_path / "bad")
    result = run_processes(
        "tests.monitoring.bad_samples_worker", 2, tmp_path / "bad", tmp_path, timeout=90
    )
    assert result.code == 0, result.output
    error = "3 of 12 samples could not be used: more than data.max_bad_fraction 0 allows."
    for rank, met in enumerate((0, 3)):
        assert (tmp_path / f"rank-{rank}.txt").read_text().startswith(f"met {met}: {error}")
    assert {entry["uid"] for entry in listed(tmp_path)} == bad
