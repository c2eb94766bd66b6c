"""Fixtures that every part's tests may use; the time of each lane; the budgets of DESIGN."""

import itertools
import subprocess
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch

from pipeline.data.index import build_index
from pipeline.data.index.splits import SplitSpec
from tests.processes import ROOT, Processes, Result, argv_of, env_of
from tests.shards import write_tiny_shards

# As the launcher has it for each process: threads that wait for each other over tiny tensors cost
# more than they give, above all where several processes share two cores.
torch.set_num_threads(1)

# A test counts for the first of these markers that it carries; without any, for "default".
LANES = ("soak", "slurm", "netns", "browser", "deepspeed", "fault", "distributed", "slow")
# Minutes on two cores that an area may take in `make test-all` (DESIGN's budgets).
BUDGETS = {
    "default lane": 10.0,
    "main job": 18.0,
    "streaming": 15.0,
    "strategies and clusters": 22.0,
    "export": 15.0,
}
STRATEGY_LANES = ("deepspeed", "netns", "slurm")
STRATEGY_TESTS = (
    "tests/launch/",
    "tests/distributed/test_elastic.py",
    "tests/distributed/test_failure.py",
    "tests/distributed/test_kills.py",
    "tests/distributed/test_nonfinite.py",
    "tests/distributed/test_stop.py",
    "tests/distributed/test_watchdog.py",
)
STREAMING_TESTS = (
    "tests/data/",
    "tests/commands/bench/",
    "tests/project/test_benchmarks.py",
    "tests/commands/test_doctor.py",
    "tests/project/test_examples.py",
    "tests/monitoring/test_ledger.py",
    "tests/commands/test_order.py",
)
EXPORT_TESTS = ("tests/export/", "tests/latents/", "tests/latents/formats/")
Seconds = dict[tuple[str, str], float]  # (area, lane) -> seconds
seconds_spent = pytest.StashKey[Seconds]()


def area_of(test: str, lane: str) -> str:
    """The area whose budget a test's time counts for."""
    if lane in STRATEGY_LANES or test.startswith(STRATEGY_TESTS):
        return "strategies and clusters"
    if test.startswith(EXPORT_TESTS):
        return "export"
    return "streaming" if test.startswith(STREAMING_TESTS) else "main job"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden",
        action="store_true",
        help="rewrite the golden files from this run; say in the commit why they changed",
    )
    parser.addoption(
        "--budgets", action="store_true", help="fail if an area takes longer than its time budget"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[seconds_spent] = defaultdict(float)
    config.pluginmanager.register(Stopwatch(config.stash[seconds_spent]))


class Stopwatch:
    """Adds up the seconds of each area and lane: set-up, call and tear-down of its tests."""

    def __init__(self, seconds: Seconds) -> None:
        self._seconds = seconds

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        lane = next((lane for lane in LANES if lane in report.keywords), "default")
        self._seconds[area_of(report.nodeid, lane), lane] += report.duration


def minutes_of(seconds: Seconds) -> dict[str, float]:
    """What each budget's tests took; soak tests have none."""
    minutes = dict.fromkeys(BUDGETS, 0.0)
    for (area, lane), spent in seconds.items():
        if lane != "soak":
            minutes[area] += spent / 60
        if lane == "default":
            minutes["default lane"] += spent / 60
    return minutes


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    seconds = config.stash[seconds_spent]
    terminalreporter.section("time per area and lane")
    for (area, lane), spent in sorted(seconds.items()):
        terminalreporter.line(f"{area:<24} {lane:<12}{spent / 60:8.1f} min")
    for name, spent in minutes_of(seconds).items():
        verdict = "  OVER BUDGET" if spent > BUDGETS[name] else ""
        terminalreporter.line(f"{name:<37}{spent:8.1f} of {BUDGETS[name]:g} min{verdict}")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    minutes = minutes_of(session.config.stash[seconds_spent])
    is_over = any(spent > BUDGETS[name] for name, spent in minutes.items())
    is_asked = session.config.getoption("--budgets")
    if is_over and is_asked and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five uneven shards of 60 small RGB pictures, indexed; shared by all tests: never write here.

    Splits: train (about three quarters) and held_out.
    """
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_shards(folder)
    build_index(folder, split=SplitSpec(fractions={"train": 0.75, "held_out": 0.25}))
    return folder


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compare a text with tests/golden/NAME; `--update-golden` writes it instead."""

    def check(name: str, text: str) -> None:
        path = ROOT / "tests" / "golden" / name
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        assert path.is_file(), f"{path} is missing: create it with --update-golden"
        assert text == path.read_text()

    return check


@pytest.fixture
def start_processes(tmp_path: Path) -> Iterator[Callable[..., Processes]]:
    """Start a module or script, by default under `accelerate launch`; ended with the test."""
    started: list[Processes] = []
    numbers = itertools.count()

    def start(
        target: str | Path,
        num_processes: int | None,
        *arguments: object,
        strategy: str = "ddp",
        env: Mapping[str, str] | None = None,
        cwd: Path = ROOT,
    ) -> Processes:
        argv = [*argv_of(target, num_processes, strategy), *map(str, arguments)]
        log = tmp_path / f"processes-{next(numbers)}.log"
        started.append(Processes(argv, log, env=env_of(strategy) | dict(env or {}), cwd=cwd))
        return started[-1]

    yield start
    for processes in started:
        if processes.running:
            processes.kill()


@pytest.fixture
def run_processes(start_processes: Callable[..., Processes]) -> Callable[..., Result]:
    """Run a module or script to its end: `run_processes("pipeline.train", 2, config, "a.b=c")`.

    None processes means plain Python: the exit code is then the program's own.
    """

    def run(
        target: str | Path,
        num_processes: int | None,
        *arguments: object,
        timeout: float = 180,
        strategy: str = "ddp",
        env: Mapping[str, str] | None = None,
        cwd: Path = ROOT,
    ) -> Result:
        options = {"strategy": strategy, "env": env, "cwd": cwd}
        running = start_processes(target, num_processes, *arguments, **options)
        return running.wait(timeout)

    return run


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mount a real file system of a given size, or change its size; needs root."""
    place = tmp_path / "disk"

    def mount(size: str, *options: str) -> Path:
        how = ",".join([*(["remount"] if place.is_mount() else []), f"size={size}", *options])
        place.mkdir(exist_ok=True)
        argv = ["mount", "-t", "tmpfs", "-o", how, "tmpfs", place]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no tmpfs can be mounted here (it needs root): {done.stderr.strip()}")
        return place

    yield mount
    if place.is_mount():
        subprocess.run(["umount", place], check=True)
