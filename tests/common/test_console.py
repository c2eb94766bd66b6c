"""Progress of long passes: one line on a terminal, few in a log, and always the last one."""

import os
import re
import sys
import termios
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise

import pytest

from pipeline.common import console
from pipeline.common.console import progress_line
from pipeline.data.progress import ProgressTracker

SHARDS = 100_000


@contextmanager
def terminal(kind: str = "xterm") -> Iterator[Callable[[], str]]:
    """Make stderr a terminal of 30 columns; yield what gives its text so far."""
    person, program = os.openpty()
    termios.tcsetwinsize(program, (24, 30))
    os.set_blocking(person, False)
    with pytest.MonkeyPatch.context() as patch, os.fdopen(program, "w") as stream:
        patch.setenv("TERM", kind)
        patch.setattr(sys, "stderr", stream)
        yield lambda: os.read(person, 1 << 20).decode()
    os.close(person)


def test_100_000_shards_print_no_100_000_lines(capsys: pytest.CaptureFixture[str]):
    with progress_line() as progress:
        tracker = ProgressTracker("verify", SHARDS, SHARDS * 1000, progress)
        for _ in range(SHARDS):
            tracker.add(1000)
    first, *_, last = lines = capsys.readouterr().err.splitlines()
    assert len(lines) < 5  # one at once, one every few seconds, and the last
    assert first.startswith("verify: 1 of 100,000 shards (0 %), ")
    assert first.endswith(" left")
    assert re.fullmatch(r"verify: 100,000 of 100,000 shards \(100 %\), [\d.]+ MB/s", last)


def test_a_log_gets_a_line_every_few_seconds(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    seconds = iter(range(1000))
    monkeypatch.setattr(console.time, "monotonic", lambda: next(seconds) / 2)
    with progress_line() as progress:
        for number in range(100):
            progress(f"{number}", number == 99)
    numbers = [int(line) for line in capsys.readouterr().err.splitlines()]
    assert numbers[-1] == 99
    assert all(9 <= after - before <= 11 for before, after in pairwise(numbers[:-1]))


def test_each_pass_shows_its_last_line(capsys: pytest.CaptureFixture[str]):
    with progress_line() as progress:
        for verb in ("pack", "index"):
            for number in range(1, 4):
                progress(f"{verb}: {number}", number == 3)
    assert capsys.readouterr().err.splitlines() == ["pack: 1", "pack: 3", "index: 3"]


def test_a_terminal_shows_one_line_that_is_rewritten():
    with terminal() as shown, progress_line() as progress:
        tracker = ProgressTracker("index", SHARDS, 0, progress)
        for _ in range(SHARDS):
            tracker.add(0)
        pieces = shown().split("\r\x1b[K")
    assert pieces[0] == ""
    assert len(pieces) < 100
    assert all("\n" not in piece for piece in pieces[:-1])
    assert all(len(piece.strip()) < 30 for piece in pieces)
    assert pieces[-1] == "index: 100,000 of 100,000 sha\r\n"


def test_what_stops_a_pass_begins_a_new_line():
    def stopped() -> None:
        with progress_line() as progress:
            progress("index: 1 of 9 shards", False)
            raise KeyboardInterrupt

    with terminal() as shown:
        with pytest.raises(KeyboardInterrupt):
            stopped()
        assert shown() == "\r\x1b[Kindex: 1 of 9 shards\r\n"


def test_a_dumb_terminal_is_a_log():
    with terminal("dumb") as shown:
        with progress_line() as progress:
            progress("one", False)
            progress("two", True)
        assert shown() == "one\r\ntwo\r\n"


def test_shares_and_time_left_of_a_pass_that_resumes(monkeypatch: pytest.MonkeyPatch):
    """What an earlier start did counts as done, but not for the speed."""
    times = iter([0.0, 0.0, 10.0, 20.0])
    monkeypatch.setattr("time.monotonic", lambda: next(times))
    lines: list[tuple[str, bool]] = []
    tracker = ProgressTracker("pack", 3, 1_000_000_000, lambda *line: lines.append(line))
    tracker.add(200_000_000, is_read=False)
    tracker.add(40_000_000)
    tracker.add(760_000_000)
    assert lines == [
        ("pack: 1 of 3 shards (20 %)", False),
        ("pack: 2 of 3 shards (24 %), 4.0 MB/s, 3 min 10 s left", False),
        ("pack: 3 of 3 shards (100 %), 40.0 MB/s", True),
    ]
