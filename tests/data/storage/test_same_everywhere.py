"""Local, nginx and S3, any ranks and threads, stopped and resumed: always the same slots."""

import hashlib
import itertools
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.data.index import Index, build_index
from pipeline.data.sequential import read_shards
from pipeline.data.settings import DataConfig
from pipeline.data.storage import ShardReadError
from pipeline.data.stream import Stream
from tests.data.storage.fault_server import Fault, FaultServer, Request, serving
from tests.data.storage.test_http_faults import FAULTS, now_and_then
from tests.data.streams import IMAGES, delivered, write_shards

COUNTS = (20, 31, 3, 0, 41, 26)  # 121 samples: ten steps of 12 and one sample in an epoch
NUM_STEPS = 11
ORDER = {"batch_size": 12, "lanes": 12, "interleave": 2, "window": 4}
WORLDS, THREADS = (1, 2, 3, 6), (1, 2, 7)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    folder = tmp_path_factory.mktemp("everywhere") / "shards"
    write_shards(folder, COUNTS)
    return build_index(folder)


def digests(slots: list) -> list[str]:
    """One digest per slot, of step, slot, key, pixels and all else that training takes."""
    return [hashlib.sha256(repr(tuple(slot)).encode()).hexdigest() for slot in slots]


@pytest.fixture(scope="module")
def baseline(index: Index) -> list[str]:
    """Local shards, one process, one thread of each kind, never stopped."""
    found = digests(delivered(index, num_steps=NUM_STEPS, threads=1, read_threads=1, **ORDER))
    assert len(found) == 12 * NUM_STEPS
    return found


def in_pieces(index: Index, seed: str, **settings: object) -> list[str]:
    """What training gets that is stopped three times in the epoch and goes on otherwise."""
    rng = random.Random(seed)
    stops = [0, *sorted(rng.sample(range(1, 10), 3)), NUM_STEPS]
    found: list[str] = []
    for first, last in itertools.pairwise(stops):
        threads = {"threads": rng.choice(THREADS), "read_threads": rng.choice((*THREADS, None))}
        piece = {"first_step": first, "num_steps": last - first, "world": rng.choice(WORLDS)}
        found += digests(delivered(index, **ORDER, **piece, **(threads | settings)))
    return found


@pytest.fixture(params=["local", "nginx", "s3"])
def root(request: pytest.FixtureRequest, index: Index) -> str:
    """Where the same shards lie."""
    folder = Path(str(index.path))
    if request.param == "local":
        return str(folder)
    if request.param == "nginx":
        serve: Callable[[Path], str] = request.getfixturevalue("nginx")
        return serve(folder)
    upload: Callable[[Path, str], str] = request.getfixturevalue("s3")
    return upload(folder, "same everywhere")


def test_a_stream_of_any_store_is_the_same(index, baseline, root):
    """The pieces draw their own ranks and threads; three draws."""
    for draw in range(3):
        assert in_pieces(index, f"any/{draw}", shards=root) == baseline


def test_the_rows_of_an_export_are_the_same(index, root):
    def rows(shards: str) -> list[tuple[list[str], bytes]]:
        data = DataConfig(path=str(index.path), shards=shards, split="all", decode=IMAGES)
        return [
            (batch.keys, batch.x.numpy().tobytes())
            for _, batches in read_shards(data, index, (0, 4), 8)
            for batch in batches
        ]

    assert rows(root) == rows(str(index.path))
    assert len(rows(root)) == 3 + 6


def test_a_later_stream_of_the_same_run_refuses_changed_shards(index):
    """As between training and its next evaluation: the store was asked for all shards once."""
    files = {path.name: path.read_bytes() for path in Path(index.path).glob("*.tar")}
    opened = Index.open(index.path)
    with serving(FaultServer(files)) as server:
        states = [opened.check_shards(server.url)]
        piece = {"num_steps": 1, "shards": server.url, "states": states, **ORDER}
        first = delivered(opened, **piece)
        assert delivered(opened, **piece) == first
        num_looks = sum(request.method == "HEAD" for request in server.requests)
        assert num_looks == len(files)
        for name, content in files.items():
            server.files[name] = bytes(len(content))  # of the same size
            server.tags[name] = 1
        with pytest.raises(ShardReadError, match=f"{server.url}/s-.*changed while it was in use"):
            delivered(opened, **piece)


@pytest.mark.slow
def test_every_number_of_ranks_and_threads_gets_the_same(index, baseline, root):
    for world, threads in itertools.product(WORLDS, THREADS):
        settings = {"world": world, "threads": threads, "read_threads": threads, "shards": root}
        found = digests(delivered(index, num_steps=NUM_STEPS, **ORDER, **settings))
        assert found == baseline, f"{world} ranks, {threads} threads"


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(0, marks=pytest.mark.fault),
        *(pytest.param(i, marks=pytest.mark.soak) for i in range(1, 20)),
    ],
)
@pytest.mark.parametrize("name", FAULTS)
def test_faults_of_the_server_do_not_reach_the_training(
    index: Index, baseline: list[str], name: str, case: int, monkeypatch: pytest.MonkeyPatch
):
    rng = random.Random(f"stream/{name}/{case}")
    folder = Path(str(index.path))
    files = {path.name: path.read_bytes() for path in folder.glob("*.tar")}
    spoil = now_and_then(FAULTS[name], rng, share=0.05 if name == "trickle" else 0.2)

    def plan(request: Request) -> Fault | None:
        # Nothing contradicts a wrong length of HEAD: the check before the start then fails.
        is_believed = request.method == "HEAD" and name == "wrong_length"
        return None if is_believed else spoil(request)

    num_retries = 0
    close = Stream.close

    def counting(stream: Stream) -> None:
        nonlocal num_retries
        num_retries += stream.counters.retries
        close(stream)

    monkeypatch.setattr(Stream, "close", counting)
    with serving(FaultServer(files, plan, seed=case)) as server:
        remote = {
            "timeout_seconds": 0.25,
            "max_wait_seconds": 0.05,
            "min_bytes_per_second": 100_000,
            "connections": 4,
            "part_bytes": 20_000,
        }
        found = in_pieces(index, f"{name}/{case}", shards=server.url, remote=remote)
        assert found == baseline
        assert server.num_faults > 0
    if name in ("500", "503", "429", "stall", "reset", "short_body"):
        assert num_retries > 0
