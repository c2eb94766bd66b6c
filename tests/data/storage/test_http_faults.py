"""Every fault of a server: the same bytes as without it, or an error that says where and why."""

import random
import time
from collections.abc import Iterator

import pytest

from pipeline.data.storage import (
    RemotePolicy,
    ShardReadError,
    ShardState,
    TransferCounters,
    open_storage,
)
from tests.data.storage.fault_server import (
    Fault,
    FaultServer,
    Plan,
    Request,
    always,
    changed,
    ignored_range,
    long_body,
    reset,
    serving,
    short_body,
    stall,
    status,
    trickle,
    wrong_length,
    wrong_range,
)

FAULTS: dict[str, Fault] = {
    "reset": reset,
    "stall": stall,
    "500": status(500),
    "503": status(503),
    "429": status(429),
    "short_body": short_body,
    "long_body": long_body,
    "wrong_length": wrong_length,
    "wrong_range": wrong_range,
    "ignored_range": ignored_range,
    "trickle": trickle,
}
# A right answer comes with these, if only the client takes it apart with care.
HARMLESS = {"long_body", "ignored_range"}
NUM_CASES, NUM_FAST = 60, 3
SLACK_SECONDS = 2.0  # of a busy machine, on top of the limits of the policy

cases = pytest.mark.parametrize(
    "case",
    [
        *(pytest.param(i, marks=pytest.mark.fault) for i in range(NUM_FAST)),
        *(pytest.param(i, marks=pytest.mark.soak) for i in range(NUM_FAST, NUM_CASES)),
    ],
)
each_fault = pytest.mark.parametrize("name", FAULTS)


def policy_of(rng: random.Random, **settings: float) -> RemotePolicy:
    quick = {
        "attempts": 6,
        "timeout_seconds": 0.2,
        "deadline_seconds": 10.0,
        "max_wait_seconds": 0.05,
        "min_bytes_per_second": 200_000,
        "connections": rng.choice([1, 3]),
        "part_bytes": rng.choice([5_000, 1 << 20]),
    }
    return RemotePolicy.model_validate(quick | settings)


def random_ranges(rng: random.Random, size: int, number: int) -> Iterator[tuple[int, int]]:
    for _ in range(number):
        offset = rng.randrange(size)
        yield offset, rng.randrange(1, min(size - offset, 30_000) + 1)


def now_and_then(fault: Fault, rng: random.Random, share: float = 0.5) -> Plan:
    """At most two faults in a row: a patient client gets through."""
    in_row = 0

    def plan(request: Request) -> Fault | None:
        nonlocal in_row
        in_row = in_row + 1 if in_row < 2 and rng.random() < share else 0
        return fault if in_row else None

    return plan


class Outcome:
    """What came of reading some ranges under faults."""

    def __init__(self) -> None:
        self.errors: list[str] = []
        self.num_right = 0
        self.counters = TransferCounters()


def read_all(server: FaultServer, policy: RemotePolicy, rng: random.Random) -> Outcome:
    """Read ranges; every one is right or an error, and in time."""
    outcome = Outcome()
    original = server.files["shards/a.tar"]
    with serving(server):
        storage = open_storage(f"{server.url}/shards", policy)
        for offset, num_bytes in random_ranges(rng, len(original), 3):
            started = time.monotonic()
            try:
                data = storage.read("a.tar", offset, num_bytes)
            except ShardReadError as error:
                outcome.errors.append(str(error))
            else:
                assert data == original[offset : offset + num_bytes]
                outcome.num_right += 1
            limit = policy.deadline_seconds + policy.timeout_seconds + SLACK_SECONDS
            assert time.monotonic() - started < limit
        outcome.counters = storage.counters
        storage.close()
    assert all(f"{server.url}/shards/a.tar" in error for error in outcome.errors)
    return outcome


def new_server(rng: random.Random, case: int, plan: Plan) -> FaultServer:
    content = rng.randbytes(rng.choice([1, 700, 40_000, 150_000]))
    return FaultServer({"shards/a.tar": content}, plan, seed=case, has_tags=rng.random() < 0.8)


@each_fault
@cases
def test_faults_now_and_then_change_no_byte(name: str, case: int):
    rng = random.Random(f"{name}/{case}")
    server = new_server(rng, case, now_and_then(FAULTS[name], rng))
    outcome = read_all(server, policy_of(rng), rng)
    assert outcome.errors == []
    # A trickle may be over before it is noticed; a wrong length may come after the last byte.
    if name not in (*HARMLESS, "trickle", "wrong_length", "wrong_range"):
        assert outcome.counters.num_retries >= server.num_faults


@each_fault
@cases
def test_faults_without_end_are_an_error_that_names_url_and_policy(name: str, case: int):
    rng = random.Random(f"always/{name}/{case}")
    server = new_server(rng, case, always(FAULTS[name]))
    policy = policy_of(rng, attempts=3, deadline_seconds=1)
    outcome = read_all(server, policy, rng)
    for error in outcome.errors:
        assert "data.remote: attempts = 3" in error
        assert "deadline_seconds = 1," in error
    if name in ("stall", "500", "503", "429"):
        assert outcome.num_right == 0
    if name in HARMLESS:
        assert outcome.errors == []
    assert outcome.num_right + len(outcome.errors) == 3


@cases
def test_a_changed_shard_is_an_error_and_never_mixed(case: int):
    rng = random.Random(f"changed/{case}")
    change_at = rng.randrange(1, 4)
    before = rng.choice([None, reset, short_body])

    def plan(request: Request) -> Fault | None:
        return changed if request.number == change_at else before if not server.tags else None

    content = rng.randbytes(100_000)
    server = FaultServer({"shards/a.tar": content}, plan, seed=case)
    with serving(server):
        storage = open_storage(f"{server.url}/shards", policy_of(rng, part_bytes=20_000))
        storage.expect("a.tar", ShardState(len(content), '"shards/a.tar-0"'))
        errors: list[str] = []
        for offset, num_bytes in [(0, 10), *random_ranges(rng, len(content), 6), (5, 90_000)]:
            try:
                assert storage.read("a.tar", offset, num_bytes) == content[offset:][:num_bytes]
            except ShardReadError as error:
                errors.append(str(error))
        assert errors
        assert all(f"{server.url}/shards/a.tar changed while" in error for error in errors)
        # The change itself is never tried again.
        assert storage.counters.num_retries <= change_at
        storage.close()


@pytest.mark.parametrize("after", ["seconds", "date"])
def test_retry_after_is_waited_for(after: str):
    waited: list[float] = []

    def plan(request: Request) -> Fault | None:
        waited.append(time.time())
        if request.number:
            return None
        date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 2))
        return status(503, Retry_After="1" if after == "seconds" else date)

    with serving(FaultServer({"a.tar": b"1234"}, plan)) as server:
        assert open_storage(server.url).read("a.tar", 1, 2) == b"23"
    assert 0.99 <= waited[1] - waited[0] < 3


def test_an_endless_retry_after_is_cut_to_the_policy():
    def plan(request: Request) -> Fault | None:
        return None if request.number else status(429, Retry_After="86400")

    with serving(FaultServer({"a.tar": b"1234"}, plan)) as server:
        storage = open_storage(server.url, RemotePolicy(max_wait_seconds=0.1))
        assert storage.read("a.tar", 1, 2) == b"23"


@pytest.mark.parametrize("number", [400, 401, 403, 404, 410, 501])
def test_what_will_not_pass_is_an_error_at_once(number: int):
    with serving(FaultServer({"a.tar": b"1234"}, always(status(number)))) as server:
        storage = open_storage(server.url)
        with pytest.raises(ShardReadError, match=rf"{server.url}/a.tar .*HTTP {number}.*busy"):
            storage.read("a.tar", 0, 4)
        assert len(server.requests) == 1
