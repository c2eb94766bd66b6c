"""How a stream reads from a server that misbehaves, with and without a change of `data.remote`."""

import time
from collections.abc import Callable
from typing import Any

from pipeline.data.index import Index
from pipeline.data.storage import ShardReadError
from tests.config.runs import Given, World
from tests.data.storage.fault_server import (
    Fault,
    FaultServer,
    Plan,
    Request,
    always,
    serving,
    stall,
    status,
    trickle,
)
from tests.shards import open_stream

Seen = Callable[[World, Given], Any]


def first_get(fault: Fault) -> Callable[[], Plan]:
    """A server whose first answer with bytes of a shard is spoiled."""

    def start() -> Plan:
        done: list[Request] = []

        def plan(request: Request) -> Fault | None:
            if request.method != "GET" or done:
                return None
            done.append(request)
            return fault

        return plan

    return start


def busy_for(seconds: float) -> Callable[[], Plan]:
    """A server that refuses bytes for a while."""

    def start() -> Plan:
        begin = time.monotonic()
        return lambda request: (
            status(503) if request.method == "GET" and time.monotonic() < begin + seconds else None
        )

    return start


def reading(start: Callable[[], Plan], see: Callable[[FaultServer], Any] | None = None) -> Seen:
    """What comes of reading one batch: `see` of the server, or whether there was an error."""

    def seen(world: World, given: Given) -> Any:
        files = {path.name: path.read_bytes() for path in world.shards.glob("*.tar")}
        with serving(FaultServer(files, start(), seconds_per_answer=0.02)) as server:
            data = world.config((*given, f"data.shards={server.url}")).data
            index = Index.open(world.shards)
            with open_stream(data, index=index, seed=0, batch_size=8, num_steps=1) as stream:
                try:
                    num_images = len(next(stream).keys)
                except ShardReadError:
                    num_images = 0
            return see(server) if see else num_images

    return seen


def num_gets(server: FaultServer) -> int:
    return sum(request.method == "GET" for request in server.requests)


IMPATIENT = "data.remote.deadline_seconds=1"
UNSEEN = "data.remote.timeout_seconds=0.2"

# path -> (what is changed, what is seen of it, what is given in both cases)
REMOTE_CHANGES: dict[str, tuple[Given, Seen, Given]] = {
    "attempts": (("data.remote.attempts=1",), reading(first_get(status(500))), ()),
    "timeout_seconds": ((UNSEEN,), reading(first_get(stall)), (IMPATIENT,)),
    "deadline_seconds": (
        ("data.remote.deadline_seconds=0.1",),
        reading(busy_for(0.6)),
        ("data.remote.attempts=1000", "data.remote.max_wait_seconds=0.05"),
    ),
    "max_wait_seconds": (
        ("data.remote.max_wait_seconds=0.05",),
        reading(first_get(status(503, Retry_After="5"))),
        (IMPATIENT,),
    ),
    "min_bytes_per_second": (
        ("data.remote.min_bytes_per_second=0",),
        reading(first_get(trickle)),
        (IMPATIENT, UNSEEN, "data.lanes=1", "data.remote.min_bytes_per_second=100000"),
    ),
    "connections": (
        ("data.remote.connections=1",),
        reading(lambda: always(None), lambda server: server.most_open),
        (),
    ),
    "part_bytes": (
        ("data.remote.part_bytes=1000",),
        reading(lambda: always(None), num_gets),
        ("data.lanes=1",),
    ),
}
