"""Processes for tests: started under `accelerate launch`, watched, and always killed."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from launch import local
from tests import forkserver

ROOT = Path(__file__).parents[1]
CPU_ENV = {
    "ACCELERATE_USE_CPU": "true",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
    "WANDB_SILENT": "true",
}


def env_of(strategy: str) -> dict[str, str]:
    """Return the environment that a strategy's processes need besides CPU_ENV."""
    return {} if strategy == "ddp" else {"ACCELERATE_USE_CPU": "false"}


def open_files(folder: Path) -> list[str]:
    """The files below `folder` that this process has open, once per descriptor, sorted."""
    files: list[str] = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # closed since it was listed, as the listing itself is
            files.append(str(descriptor.readlink()))
    return sorted(file for file in files if Path(file).is_relative_to(folder))


@dataclass(frozen=True)
class Result:
    """Exit code of the launcher, and the output of all its processes."""

    code: int
    output: str


class Processes:
    """A running command and its descendants.

    forked: started fast by `tests.forkserver`; otherwise with new interpreters, as users do.
    """

    def __init__(
        self,
        argv: list[str],
        log: Path,
        *,
        env: Mapping[str, str],
        cwd: Path,
        forked: bool = False,
    ) -> None:
        self._log = log
        log.write_bytes(b"")
        env = os.environ | CPU_ENV | env
        if forked:
            self._process = forkserver.Command(argv, log, env=env, cwd=cwd)
        else:
            with log.open("wb") as file:
                self._process = subprocess.Popen(
                    argv,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env=env,
                    cwd=cwd,
                    start_new_session=True,
                )
        self.pid = self._process.pid

    @property
    def output(self) -> str:
        """Output so far."""
        return self._log.read_text(errors="replace")

    @property
    def running(self) -> bool:
        """Whether the command itself still runs."""
        return self._process.poll() is None

    def ranks(self) -> list[psutil.Process]:
        """The launcher's children, one process per rank, in the order of their ranks."""
        found = local.trainers(self.pid) if self.running else []
        return sorted(found, key=lambda rank: rank.pid)  # started one after the other

    def everything(self) -> list[psutil.Process]:
        """The command and all its descendants that still run."""
        try:
            parent = psutil.Process(self.pid)
            return [parent, *parent.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def kill(self) -> None:
        """Send SIGKILL to all processes, as a power cut would end them."""
        alive = self.everything()
        for process in alive:
            try:
                process.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs([process for process in alive if process.pid != self.pid], timeout=10)
        self._process.wait(timeout=10)

    def wait(self, timeout: float = 180) -> Result:
        """Wait for the end; after `timeout` seconds kill all processes and fail with the output."""
        try:
            code = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"no end after {timeout} s; it printed:\n{self.output}") from None
        return Result(code, self.output)

    def wait_for(self, text: str, timeout: float = 60) -> None:
        """Wait until `text` has been printed; otherwise fail with the output."""
        limit = time.monotonic() + timeout
        while text not in self.output:
            if not self.running or time.monotonic() > limit:
                raise AssertionError(f"never printed {text!r}, but:\n{self.output}")
            time.sleep(0.02)


def argv_of(target: str | Path, num_processes: int | None, strategy: str = "ddp") -> list[str]:
    """Return the command for a script (*.py) or module; None processes: no launcher.

    strategy: ddp, zero1, zero2 or zero3.
    """
    what = [str(target)] if str(target).endswith(".py") else ["-m", str(target)]
    if num_processes is None:
        return [sys.executable, *what]
    if strategy == "ddp":
        name = "single-cpu.yaml" if num_processes == 1 else "cpu-ddp.yaml"
    else:
        name = f"{strategy}.yaml"
    return [*local.launcher(ROOT / "configs/accelerate" / name, num_processes), *what]
