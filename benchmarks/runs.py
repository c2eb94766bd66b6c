"""Runs of loaders in separate processes: interpreter, environment, result."""

import json
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).parents[1]
TIMEOUT_SECONDS = 900
ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "LITDATA_DISABLE_VERSION_CHECK": "1",
}


class MeasurementError(Exception):
    """A loader's process failed; the text is the last line of its output."""


class Runner:
    """Starts the loaders' processes; a context manager, for its scratch files."""

    def __init__(self, data: Path, pythons: Sequence[Path]) -> None:
        self.ready: dict[str, dict[str, Any]] = {}  # loaders that run here: versions, abilities
        self.absent: dict[str, str] = {}  # and those that do not: why
        self.scratch = Path(tempfile.mkdtemp(dir=data, prefix="scratch-"))
        self._pythons = pythons
        self._python_of: dict[str, Path] = {}
        self._num_runs = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.scratch)

    def prepare(self, name: str, **task: Any) -> None:
        """Have the loader write its own format, in the first Python that has its packages."""
        known = self._python_of.get(name)
        reasons: list[str] = []
        for python in [known] if known else self._pythons:
            self._python_of[name] = python
            try:
                self.ready[name] = self.run(name, "prepare", **task)
            except MeasurementError as failure:
                reasons.append(f"{python}: {failure}")
            else:
                return
        self.absent[name] = "; ".join(reasons)
        self.ready.pop(name, None)

    def run(self, name: str, action: str, *, our_decoder: bool = False, **task: Any) -> Any:
        """Run one action in a fresh process and return its result; raise MeasurementError."""
        return self.run_ranks(name, action, 1, our_decoder=our_decoder, **task)[0]

    def run_ranks(
        self, name: str, action: str, world: int, *, our_decoder: bool, **task: Any
    ) -> list[Any]:
        """Run an action as `world` processes at once, each told its rank as launchers do."""
        port = _free_port()
        started: list[tuple[subprocess.Popen[bytes], Path, Path]] = []
        for rank in range(world):
            fields = {"prepared": str(Path(task["pictures"], "prepared", name)), **task}
            fields |= {"action": action, "our_decoder": our_decoder, "rank": rank, "world": world}
            self._num_runs += 1
            files = self.scratch / str(self._num_runs)
            files.mkdir()
            (files / "task.json").write_text(json.dumps(fields))
            started.append(self._start(name, files, rank, world, port))
        try:
            return [_result(*run) for run in started]
        finally:
            for process, _, _ in started:
                if process.poll() is None:
                    process.kill()
                    process.wait()

    def _start(
        self, name: str, files: Path, rank: int, world: int, port: int
    ) -> tuple[subprocess.Popen[bytes], Path, Path]:
        argv = [str(self._python_of[name]), "-m", f"benchmarks.rivals.{name}"]
        environment = os.environ | ENVIRONMENT | {"HF_HOME": str(self.scratch / "huggingface")}
        if world > 1:
            # GLOBAL_RANK is what LitData calls RANK.
            ranks = {"RANK": rank, "GLOBAL_RANK": rank, "LOCAL_RANK": rank}
            worlds = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
            rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            environment |= {key: str(it) for key, it in (ranks | worlds | rendezvous).items()}
        result, log = files / "result.json", files / "log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                [*argv, str(files / "task.json"), str(result)],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=ROOT,
            )
        return process, result, log


def _result(process: subprocess.Popen[bytes], result: Path, log: Path) -> Any:
    try:
        code = process.wait(TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        raise MeasurementError(f"not finished after {TIMEOUT_SECONDS} s") from None
    if code != 0:
        lines = log.read_text(errors="replace").strip().splitlines()
        raise MeasurementError(lines[-1] if lines else f"exit code {code}")
    return json.loads(result.read_text())


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])
