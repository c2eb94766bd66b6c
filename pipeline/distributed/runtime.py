"""This process among the processes of a run: start-up checks, collectives, stop requests.

Modules that only the main process may write from check `is_main` themselves (`monitoring.monitor`,
`checkpoints.manager`, `training.run_directory`): so the training loop reads as for one process.
"""

import ctypes
import importlib
import os
import signal
import sys
import time
from collections.abc import Generator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
)
from torch import Tensor

from pipeline import PARENT_AT_START
from pipeline.common.errors import UserError
from pipeline.common.precision import fix_arithmetic
from pipeline.distributed.rendezvous import (
    HOW_TO_LAUNCH,
    check_announced,
    check_device,
    check_launcher,
    rendezvous,
)

STOP_FILE_POLL_SECONDS = 1.0
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Runtime:
    """This process among `world` processes, as `accelerate launch` started them."""

    def __init__(self, accelerator: Accelerator, timeout: timedelta | None = None) -> None:
        self.accelerator = accelerator
        self.rank: int = accelerator.process_index
        self.world: int = accelerator.num_processes
        self.device: torch.device = accelerator.device
        # Decisions (stop? saved?) use a CPU group of their own, apart from the gradients' group.
        needs_own_group = self.world > 1 and dist.get_backend() != "gloo"
        own_group = dist.new_group(backend="gloo", timeout=timeout) if needs_own_group else None
        self._control = cast(dist.ProcessGroup | None, own_group)

    @classmethod
    def start(cls, *, accumulation: int, timeout_seconds: float | None = None) -> "Runtime":
        """Join the other processes; raises UserError if they do not see each other.

        accumulation: micro-batches per step, by which accelerate divides every loss.
        timeout_seconds: timeout of collectives; None: torch's default.
        """
        check_announced(os.environ)
        _die_with_parent()
        check_launcher(os.environ)
        on_cpu = not torch.accelerator.is_available()
        check_device(os.environ, has_gpu=not on_cpu)
        fix_arithmetic()
        timeout = None if timeout_seconds is None else timedelta(seconds=timeout_seconds)
        handlers: list[Any] = [
            InitProcessGroupKwargs(timeout=timeout),
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
        ]
        if asks_for_deepspeed(os.environ):
            prepare_deepspeed(os.environ, on_cpu=on_cpu)
            backend = "gloo" if on_cpu else None
            handlers = [InitProcessGroupKwargs(backend=backend, timeout=timeout)]
        with rendezvous(os.environ):
            accelerator = Accelerator(
                # With cpu=True, accelerate would leave out DeepSpeed without a warning.
                cpu=on_cpu and not asks_for_deepspeed(os.environ),
                mixed_precision="no",  # the config's `precision` does autocast
                gradient_accumulation_steps=accumulation,
                kwargs_handlers=handlers,
            )
        check_launch(os.environ, rank=accelerator.process_index, world=accelerator.num_processes)
        runtime = cls(accelerator, timeout)
        ranks = runtime.sum(torch.tensor(float(runtime.rank), device=runtime.device)).item()
        expected = runtime.world * (runtime.world - 1) / 2
        if ranks != expected:
            raise UserError(
                f"the {runtime.world} processes do not all reach each other: the sum of their "
                f"ranks is {ranks:g} instead of {expected:g}. Check MASTER_ADDR, MASTER_PORT and "
                "the launcher."
            )
        return runtime

    @property
    def hardware(self) -> str:
        """Number of processes and kind of device, in words."""
        kind = "CPU"
        if self.device.type != "cpu":
            kind = torch.cuda.get_device_name() if self.device.type == "cuda" else self.device.type
        return f"{self.world} {'process' if self.world == 1 else 'processes'} on {kind}"

    @property
    def uses_deepspeed(self) -> bool:
        """Whether the topology file chose DeepSpeed."""
        return self.accelerator.distributed_type == DistributedType.DEEPSPEED

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes for all."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of `values` over the processes, on every one; a collective."""
        if self.world > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Tell whether `flag` holds on any process; a collective without a device sync."""
        if self.world == 1:
            return flag
        votes = torch.tensor(int(flag))
        dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=self._control)
        return bool(votes.item())

    def first_reason(self, reason: str | None) -> str | None:
        """Return the reason of the lowest rank that has one; a collective, cheap if none has."""
        if not self.any(reason is not None):
            return None
        return next(found for found in self.gather(reason) if found is not None)

    def broadcast(self, value: Any) -> Any:
        """Return the main process's `value` on all; the others' is ignored; a collective."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._control)
        return box[0]

    def broadcast_tensors(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite tensors in CPU memory with those of the main process; a collective."""
        for tensor in tensors if self.world > 1 else ():
            dist.broadcast(tensor, src=0, group=self._control)

    def gather(self, value: Any) -> list[Any]:
        """Return every process's `value`, by rank; a collective for small objects."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self._control)
        return values

    @contextmanager
    def sharing_errors(self) -> Generator[None]:
        """Raise on all processes, at the end, a UserError of any process; a collective.

        The context must contain no collective.
        """
        problem: str | None = None
        try:
            yield
        except UserError as error:
            problem = str(error)
        problem = self.first_reason(problem)
        if problem is not None:
            raise UserError(problem)


def asks_for_deepspeed(environment: Mapping[str, str]) -> bool:
    """Whether the launcher's topology file says DEEPSPEED."""
    return environment.get("ACCELERATE_USE_DEEPSPEED", "false") == "true"


def prepare_deepspeed(environment: MutableMapping[str, str], *, on_cpu: bool) -> None:
    """Prepare the environment for DeepSpeed; raise UserError if it cannot run.

    On CPUs nothing is compiled: the only op that DeepSpeed would build there is for inference.
    """
    if environment.get("ACCELERATE_USE_CPU", "false") == "true":
        raise UserError(
            "ACCELERATE_USE_CPU is set, so accelerate would leave out DeepSpeed without a warning: "
            "unset it (and use_cpu in the topology file); without a GPU it stays on the CPU anyway."
        )
    try:
        importlib.import_module("transformers")  # accelerate imports it for DeepSpeed
        if on_cpu:
            environment["DS_ACCELERATOR"] = "cpu"
        ops: Any = importlib.import_module("deepspeed").ops
    except ImportError as error:
        raise UserError(
            f"The topology file asks for DeepSpeed, which cannot be imported ({error}): install "
            "the extra, `pip install -c constraints.txt -e '.[deepspeed]'`."
        ) from error
    if on_cpu:
        ops.__compatible_ops__["deepspeed_shm_comm"] = False


def check_launch(environment: Mapping[str, str], *, rank: int, world: int) -> None:
    """Raise UserError unless rank and world size are those that the launcher announced.

    On a machine without GPUs, accelerate can start several processes that each take themselves for
    the only one: they would train apart and overwrite each other's files.
    """
    announced_world = int(environment.get("WORLD_SIZE", "1"))
    announced_rank = int(environment.get("RANK", "0"))
    if (rank, world) != (announced_rank, announced_world):
        raise UserError(
            f"the launcher announced process {announced_rank} of {announced_world} (RANK, "
            f"WORLD_SIZE), but accelerate runs as process {rank} of {world}: the processes do not "
            f"see each other. {HOW_TO_LAUNCH}"
        )


class Stopped(Exception):  # noqa: N818 - not an error
    """All processes are asked to stop; the message says what asked."""


class StopRequest:
    """SIGTERM, SIGUSR1, Ctrl-C or a file STOP in the run directory; checked between steps.

    A second Ctrl-C interrupts immediately.
    """

    def __init__(self, run_dir: Path) -> None:
        self._file = run_dir / "STOP"
        self._signal: int | None = None
        self._next_poll = 0.0
        self._previous = {number: signal.getsignal(number) for number in self._numbers()}
        for number in self._numbers():
            signal.signal(number, self._remember)

    @staticmethod
    def _numbers() -> tuple[signal.Signals, ...]:
        return (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if number == self._signal == signal.SIGINT:
            signal.default_int_handler(number, frame)
        self._signal = number

    def reason(self) -> str | None:
        """Return why this process should stop; None if it should not."""
        if self._signal is not None:
            return f"signal {signal.Signals(self._signal).name}"
        now = time.monotonic()
        if now >= self._next_poll:
            self._next_poll = now + STOP_FILE_POLL_SECONDS
            if self._file.exists():
                return f"the file {self._file}"
        return None

    def check(self, runtime: Runtime) -> None:
        """Raise Stopped on every process if any of them should stop; a collective."""
        reason = runtime.first_reason(self.reason())
        if reason is not None:
            raise Stopped(reason)

    def close(self) -> None:
        """Restore the former signal handlers."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def _die_with_parent() -> None:
    """Ask Linux for a SIGTERM when the launcher dies, so that no trainer is left behind."""
    # Only under torchrun or accelerate launch: a plain Python process may outlive its shell.
    is_launched = not {"WORLD_SIZE", "ACCELERATE_MIXED_PRECISION"}.isdisjoint(os.environ)
    if sys.platform != "linux" or not is_launched:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != PARENT_AT_START:  # too late for a signal
        sys.exit("error: the launcher has died while this process was starting")
