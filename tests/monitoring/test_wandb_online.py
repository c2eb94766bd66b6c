"""Runs sent to a server of W&B: over several starts, over a broken network, and by `wandb sync`."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.monitoring import wandb_sink
from pipeline.monitoring.wandb_sink import WandbSink
from tests.monitoring.pieces import logged, pieces
from tests.monitoring.test_wandb import KEY, start
from tests.monitoring.wandb_server import WandbServer, serving

pytestmark = [pytest.mark.usefixtures("no_login"), pytest.mark.slow]


@pytest.fixture
def server(no_login: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    with serving(WandbServer()) as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        yield server


def assert_whole(server: WandbServer, run_dir: Path) -> None:
    """Fail unless the server has every step of metrics.jsonl once, and one run."""
    [name] = server.runs
    assert name == (run_dir / "wandb" / "run-id").read_text()
    assert server.steps(name) == list(logged(run_dir))


def test_each_start_sends_what_the_server_lacks(
    server: WandbServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    run_dir = tmp_path / "run"
    start(run_dir, last=3)
    assert_whole(server, run_dir)
    [name] = server.runs
    line = f"wandb: online {server.url}/team/latentmill/runs/{name}"
    assert [t for t in capsys.readouterr().err.splitlines() if " online " in t] == [line, line]
    start(run_dir, first=2, last=5)  # from an earlier checkpoint: step 3 is there already
    assert_whole(server, run_dir)
    monkeypatch.setenv("WANDB_MODE", "offline")
    start(run_dir, first=5, last=7)
    monkeypatch.delenv("WANDB_MODE")
    assert len(server.steps(name)) == 5
    start(run_dir, first=7, last=8)
    assert_whole(server, run_dir)
    assert server.exit_codes == {name: 0}


def test_a_start_that_ends_when_the_server_has_its_run_leaves_no_second_one(
    server: WandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    begin = WandbSink._init

    def begin_and_end(self: WandbSink, mode: str, **arguments: Any) -> None:
        begin(self, mode, **arguments)
        self._run.finish(exit_code=1)
        raise RuntimeError("as a kill")

    run_dir = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(WandbSink, "_init", begin_and_end)
        start(run_dir, last=3)
    assert len(server.runs) == 1
    start(run_dir, first=3, last=6)
    assert_whole(server, run_dir)


def test_sync_sends_a_run_of_several_offline_starts_once(
    server: WandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run_dir = tmp_path / "run"
    for first in (0, 3):
        start(run_dir, first=first, last=first + 4, mode="offline")
    found = pieces(run_dir / "wandb")
    argv = [sys.executable, "-m", "wandb", "sync", *found]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert_whole(server, run_dir)


def test_what_a_broken_network_lost_is_sent_by_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    run_dir, server = tmp_path / "run", WandbServer()
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setattr(wandb_sink, "FINISH_SECONDS", 2.0)
    with serving(server):
        start(run_dir, last=3)
        first = server.steps(*server.runs)
        server.refuses_history = True
        start(run_dir, first=3, last=6)
    printed = capsys.readouterr().err
    assert printed.count("warning: ") == 1
    assert "did not take all of it within 2 s: `wandb sync " in printed
    assert server.steps(*server.runs) == first
    assert len(logged(run_dir)) == 6
    again = WandbServer(server.server_port)
    again.runs, again.lines = server.runs, server.lines
    with serving(again):
        start(run_dir, first=6, last=8)
    assert_whole(again, run_dir)
