"""Fixtures for all tests; the areas of tests and their time budgets."""

import itertools
import subprocess
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from tests.processes import ROOT, Processes, Result, argv_of, env_of

# As the launcher sets it for each process: threads slow down tiny tensors, above all when several
# processes share two cores.
torch.set_num_threads(1)

# A test belongs to the first of these lanes whose marker it has; without a marker to "default".
LANES = (
    "soak",
    "gpu",
    "slurm",
    "netns",
    "browser",
    "deepspeed",
    "fault",
    "distributed",
    "alone",
    "slow",
)
DEFAULT = "default lane"  # what `make test` runs


class Area(NamedTuple):
    """Folders whose tests share a time budget, in all lanes but the default one."""

    aim_minutes: float  # on two idle cores
    folders: tuple[str, ...] = ()


# Every folder of tests/ needs an area; a test in a folder without one is an error.
AREAS = {
    DEFAULT: Area(5),
    "main job": Area(5, ("training", "monitoring", "released", "gpu")),
    "streaming": Area(5, ("data", "commands/bench")),
    "strategies and clusters": Area(11, ("distributed", "checkpoints", "launch")),
    "export": Area(8, ("export", "latents")),
    "models": Area(4, ("models",)),
    "objectives": Area(4, ("losses", "corruptions", "seams")),
    "evaluation": Area(3, ("evaluation",)),
    "users": Area(5, ("commands", "common", "config", "docs", "latentmill", "project")),
}
AREA_OF = {folder: name for name, area in AREAS.items() for folder in area.folders}
SLACK = 1.5  # a build fails above this multiple of an area's aim, as machines differ in speed
MAX_MINUTES = 75
NUM_SLOWEST = 10
Seconds = dict[str, dict[str, float]]  # area -> test -> seconds
seconds_spent = pytest.StashKey[Seconds]()


def area_of(test: str, lane: str) -> str:
    """Return the area whose budget includes a test."""
    folders = test.split("/")[1:-1]
    inner = "/".join(folders)
    return DEFAULT if lane == "default" else AREA_OF.get(inner) or AREA_OF[folders[0]]


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
    config.stash[seconds_spent] = defaultdict(lambda: defaultdict(float))
    config.pluginmanager.register(Stopwatch(config.stash[seconds_spent]))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Fail if a test's folder has no area."""
    without_area = {item.nodeid for item in items if item.nodeid.split("/")[1] not in AREA_OF}
    if without_area:
        raise pytest.UsageError(f"no area in tests/conftest.py for {sorted(without_area)[0]}")


class Stopwatch:
    """Adds up the seconds of each test: set-up, call and tear-down; not of soak tests."""

    def __init__(self, seconds: Seconds) -> None:
        self._seconds = seconds

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        lane = next((lane for lane in LANES if lane in report.keywords), "default")
        if lane != "soak":
            self._seconds[area_of(report.nodeid, lane)][report.nodeid] += report.duration


def minutes_of(config: pytest.Config) -> dict[str, float]:
    """Return the minutes of each area, divided by the number of processes of `-n`."""
    seconds, at_once = config.stash[seconds_spent], config.getoption("numprocesses", None) or 1
    return {name: sum(seconds[name].values()) / 60 / at_once for name in AREAS}


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Print the slowest tests of each area, and the table of areas."""
    seconds = config.stash[seconds_spent]
    minutes = minutes_of(config)
    terminalreporter.section("slowest tests of each area, seconds")
    for name in AREAS:
        slowest = sorted(seconds[name].items(), key=lambda item: -item[1])[:NUM_SLOWEST]
        for test, spent in slowest:
            if spent >= 1:
                terminalreporter.line(f"{name:<24}{spent:8.1f}  {test.removeprefix('tests/')}")
    terminalreporter.section("time per area")
    for name, spent in minutes.items():
        aim = AREAS[name].aim_minutes
        verdict = "  OVER BUDGET" if spent > SLACK * aim else "  over its aim" * (spent > aim)
        terminalreporter.line(f"{name:<24}{spent:8.1f} of {aim:g} min{verdict}")
    aims = sum(area.aim_minutes for area in AREAS.values())
    terminalreporter.line(f"{'in all':<24}{sum(minutes.values()):8.1f} of {aims:g} min")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    minutes = minutes_of(session.config)
    is_over = any(minutes[name] > SLACK * area.aim_minutes for name, area in AREAS.items())
    is_over |= sum(minutes.values()) > MAX_MINUTES
    is_asked = session.config.getoption("--budgets")
    if is_over and is_asked and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five uneven shards of 60 small RGB images, indexed; shared by all tests, so read-only.

    Splits: train (about three quarters) and held_out.
    """
    # Not at the top: the interpreter of `make test-gpu` may lack packages that these need.
    from pipeline.data.index import build_index
    from pipeline.data.index.splits import SplitSpec
    from tests.shards import write_tiny_shards

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
    """Start a module or script, under `accelerate launch` or not; killed at the end of the test.

    forked: see `Processes`.
    """
    started: list[Processes] = []
    numbers = itertools.count()

    def start(
        target: str | Path,
        num_processes: int | None,
        *arguments: object,
        strategy: str = "ddp",
        env: Mapping[str, str] | None = None,
        cwd: Path = ROOT,
        forked: bool = True,
    ) -> Processes:
        argv = [*argv_of(target, num_processes, strategy), *map(str, arguments)]
        log = tmp_path / f"processes-{next(numbers)}.log"
        env = env_of(strategy) | dict(env or {})
        started.append(Processes(argv, log, env=env, cwd=cwd, forked=forked))
        return started[-1]

    yield start
    for processes in started:
        if processes.running:
            processes.kill()


@pytest.fixture
def run_processes(start_processes: Callable[..., Processes]) -> Callable[..., Result]:
    """Run a module or script to its end: `run_processes("pipeline.train", 2, config, "a.b=c")`.

    None as the number of processes: plain Python without a launcher, with the program's exit code.
    """

    def run(
        target: str | Path,
        num_processes: int | None,
        *arguments: object,
        timeout: float = 180,
        strategy: str = "ddp",
        env: Mapping[str, str] | None = None,
        cwd: Path = ROOT,
        forked: bool = True,
    ) -> Result:
        options = {"strategy": strategy, "env": env, "cwd": cwd, "forked": forked}
        running = start_processes(target, num_processes, *arguments, **options)
        return running.wait(timeout)

    return run


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mount a tmpfs of a given size, or change its size; needs root."""
    folder = tmp_path / "disk"

    def mount(size: str, *options: str) -> Path:
        how = ",".join([*(["remount"] if folder.is_mount() else []), f"size={size}", *options])
        folder.mkdir(exist_ok=True)
        argv = ["mount", "-t", "tmpfs", "-o", how, "tmpfs", folder]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no tmpfs can be mounted here (it needs root): {done.stderr.strip()}")
        return folder

    yield mount
    if folder.is_mount():
        subprocess.run(["umount", folder], check=True)
