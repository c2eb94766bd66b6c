"""What a start does once: it builds the order and looks at every shard, and no evaluation again.

Counted where it cannot be hidden: a real HTTP server writes down who asked for what.
"""

import json
import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pipeline.common import strict
from pipeline.common.errors import DONE
from pipeline.config import TrainConfig
from pipeline.data.index.reader import Index
from pipeline.data.order import Order
from pipeline.data.storage import ShardReadError
from pipeline.evaluation.trained import evaluate_run
from pipeline.train import train
from tests.config.runs import BASE
from tests.data.storage.fault_server import NO_FAULT, FaultServer, Request, serving

NUM_STEPS = 2  # each with an evaluation, besides that of the start


@pytest.fixture(scope="module")
def running(tiny_shards: Path) -> Iterator[FaultServer]:
    """The tiny shards as two data sets, a and b, on a server that records all requests."""
    paths = sorted(tiny_shards.glob("*.tar"))
    files = {f"{root}/{path.name}": path.read_bytes() for root in "ab" for path in paths}
    with pytest.MonkeyPatch.context() as environment, serving(FaultServer(files)) as server:
        environment.setenv("no_proxy", "127.0.0.1")
        yield server


@pytest.fixture(scope="module")
def trained(
    running: FaultServer, tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The directory of a finished run on data set a."""
    run_dir = tmp_path_factory.mktemp("run")
    assert train(config_of(running, tiny_shards, run_dir, "a")) == DONE
    return run_dir


@pytest.fixture
def server(running: FaultServer, trained: Path) -> FaultServer:
    """The server, without recorded requests."""
    running.requests.clear()
    return running


@pytest.fixture
def tails(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tail of every order that is built: training carries on, an evaluation masks."""
    built: list[str] = []
    build = Order.__init__

    def build_and_count(order: Order, *args: Any, tail: str = "carry", **options: Any) -> None:
        built.append(tail)
        build(order, *args, tail=tail, **options)

    monkeypatch.setattr(Order, "__init__", build_and_count)
    return built


@pytest.fixture
def callers(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The functions that lead to each look at a data set's shards, outermost first."""
    seen: list[list[str]] = []
    look = Index.check_shards

    def look_and_count(index: Index, shards: Any) -> Any:
        seen.append([frame.name for frame in traceback.extract_stack()[-4:-1]])
        return look(index, shards)

    monkeypatch.setattr(Index, "check_shards", look_and_count)
    return seen


@contextmanager
def opened() -> Iterator[list[Path]]:
    """The files that Python opens meanwhile. An audit hook is for ever, so it is told when."""
    paths: list[Path] = []
    is_watching = True

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if is_watching and event == "open" and isinstance(arguments[0], str):
            paths.append(Path(arguments[0]))

    sys.addaudithook(hook)
    try:
        yield paths
    finally:
        is_watching = False


def config_of(server: FaultServer, tiny_shards: Path, run_dir: Path, roots: str) -> TrainConfig:
    """A run on data sets of the server; their index lies on this machine."""
    places = [{"path": str(tiny_shards), "shards": f"{server.url}/{root}"} for root in roots]
    overrides = [
        f"run_dir={run_dir}",
        f"num_steps={NUM_STEPS}",
        "evaluation.every_steps=1",
        "data.read_threads=8",
    ]
    if len(places) == 1:
        overrides += [f"data.{name}={value}" for name, value in places[0].items()]
    else:
        overrides.append(f"data.mixture={json.dumps(places)}")
    return strict.load(TrainConfig, None, overrides, text=json.dumps(BASE))


def shards_of(server: FaultServer, roots: str) -> set[str]:
    return {path for path in server.files if path[0] in roots}


def looks(server: FaultServer) -> Counter[str]:
    """Number of checks of each shard, which read no byte of it."""
    return Counter(request.path for request in server.requests if request.method == "HEAD")


def num_reads(server: FaultServer) -> int:
    return sum(request.method == "GET" for request in server.requests)


def evaluations(run_dir: Path) -> list[int]:
    """The steps at which raw and averaged weights were evaluated."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [r["step"] for r in records if {"eval/loss", "eval_ema/loss"} <= r.keys()]


LOOK = ["train", "check_data", "check_shards"]


@pytest.mark.parametrize("roots", ["a", "ab"], ids=["one data set", "a mixture of two"])
def test_a_start_looks_at_each_shard_once_and_builds_its_order_once(
    server: FaultServer,
    tiny_shards: Path,
    tmp_path: Path,
    tails: list[str],
    callers: list[list[str]],
    roots: str,
):
    config = config_of(server, tiny_shards, tmp_path, roots)
    shards = shards_of(server, roots)
    assert train(config) == DONE
    assert evaluations(tmp_path) == list(range(NUM_STEPS + 1))
    assert looks(server) == dict.fromkeys(shards, 1)
    assert callers == [LOOK] * len(roots)
    assert Counter(tails) == {"carry": len(roots), "mask": len(roots)}
    assert num_reads(server) > NUM_STEPS

    # Another start looks once more, however many evaluations there were.
    assert train(config.model_copy(update={"num_steps": NUM_STEPS + 1})) == DONE
    assert evaluations(tmp_path) == list(range(NUM_STEPS + 2))
    assert looks(server) == dict.fromkeys(shards, 2)
    assert callers == [LOOK] * 2 * len(roots)
    assert Counter(tails) == {"carry": 2 * len(roots), "mask": 2 * len(roots)}


def test_evaluating_a_run_looks_once_and_reads_its_config_once(
    server: FaultServer, trained: Path, tails: list[str]
):
    with opened() as paths:
        metrics = evaluate_run(trained).figures
    assert {"eval/loss", "eval_ema/loss"} <= metrics.keys()
    assert looks(server) == dict.fromkeys(shards_of(server, "a"), 1)
    assert tails == ["mask"]
    assert paths.count(trained / "config.yaml") == 1
    # The weights' files are read to verify them, so what is opened is seen; the moments are not.
    read = {path.name for path in paths if path.parent.name == f"step-{NUM_STEPS}"}
    assert read == {"MANIFEST.json", "state.json", "model.safetensors", "ema.safetensors"}


def test_what_was_seen_at_the_start_holds_for_the_evaluation(server: FaultServer, trained: Path):
    """Shards that change between their check and the first byte are not evaluated."""

    def replace_all(request: Request) -> None:
        if request.method == "GET":
            server.tags = dict.fromkeys(server.files, 1)

    server.plan = replace_all
    with pytest.raises(ShardReadError, match="changed while it was in use"):
        evaluate_run(trained)
    server.plan, server.tags = NO_FAULT, {}
    assert evaluate_run(trained).step == NUM_STEPS
