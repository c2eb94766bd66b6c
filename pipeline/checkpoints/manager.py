"""Checkpoints of a running job: all processes save together and resume from the same one.

    save    all processes: gather the state on the main process      the training waits
            main process, in a thread: write, publish, retain        the training goes on

`folder` writes and reads the files in one process, `retention` decides which checkpoints are kept;
this file has the collectives.
"""

import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from itertools import count
from pathlib import Path

from pipeline.checkpoints.folder import (
    DamagedCheckpointError,
    RunState,
    list_checkpoints,
    read_state,
    read_tensors,
    save_checkpoint,
    set_aside,
    verify_checkpoint,
)
from pipeline.checkpoints.retention import CheckpointConfig, retain
from pipeline.common.console import warn
from pipeline.common.errors import UserError
from pipeline.data.order.mixture import Mixture
from pipeline.distributed.runtime import Runtime
from pipeline.distributed.strategies.base import FullState, Strategy
from pipeline.monitoring.monitor import Records

NUM_TRIES, RETRY_SECONDS = 3, 2.0  # for a shared disk that shows files late
_VERSIONS_OF = ("latentmill", "torch", "accelerate", "numpy", "safetensors")


class Checkpoints:
    """The checkpoints of a running job. Every process has one; all call its methods together."""

    def __init__(
        self,
        directory: Path,
        config: CheckpointConfig,
        *,
        strategy: Strategy,
        order: Mixture,
        runtime: Runtime,
    ) -> None:
        self._directory = directory
        self._config = config
        self._strategy = strategy
        self._order = order
        self._runtime = runtime
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[float] | None = None
        self._values: dict[int, float] = {}  # of the metric of keep.best, by step
        self._snapshot: FullState | None = None
        self.init_from: dict[str, str] | None = None  # see `RunState`
        self._last_worked = True
        self._num_failures = 0
        self._stall_seconds = self._write_seconds = 0.0

    def restore(self) -> int | None:
        """Restore the newest checkpoint that verifies everywhere, and return its step.

        Without a checkpoint the initial state is kept; returns None. Raises UserError if the
        checkpoint belongs to other data or another order of samples.
        """
        path = newest_verified(self._directory, self._runtime)
        if path is None:
            return None
        state = read_state(path)
        _check_data(state, self._order, path)
        self.init_from = state.init_from
        self._strategy.load_full_state(read_tensors(path))
        return state.step

    @property
    def best_step(self) -> int | None:
        """The step of the best evaluation so far, if `keep.best` asks for it."""
        by = self._config.keep.best
        return None if by is None else by.best(self._values)

    @property
    def evaluations_since_best(self) -> int:
        """Number of evaluations since the best one, those that are not finite included."""
        best = self.best_step
        return sum(best is None or step > best for step in self._values)

    def load_evaluations(self, records: Records) -> None:
        """Load the former evaluations of the run, from the records that the main process read.

        Raises UserError if they lack the metric that `keep.best` names.
        """
        by, values = self._config.keep.best, self._values
        with self._runtime.sharing_errors():
            if by is not None and self._runtime.is_main:
                values = by.values(records)
        self._values = self._runtime.broadcast(values)

    def add_evaluation(self, metrics: Mapping[str, float], step: int) -> bool:
        """Add the evaluation of `step`; return whether it is the best one, to be saved.

        Raises UserError if it lacks the metric that `keep.best` names.
        """
        by = self._config.keep.best
        if by is None:
            return False
        self._values |= by.values([{"step": step, **metrics}])
        return self.best_step == step

    def save(self, step: int) -> None:
        """Save the state after `step` global batches: gathered now, written in the background.

        At most one checkpoint is being written; the next waits for it. If the disk is full or
        broken, the failure is reported and counted, older checkpoints stay, and the run goes on.
        """
        started = time.monotonic()
        self._collect()
        tensors = self._strategy.full_state(wanted=self._runtime.is_main, into=self._snapshot)
        self._snapshot = tensors
        if self._runtime.is_main:
            state = RunState(
                step=step,
                position=step * self._order.batch_size,
                num_updates=tensors.num_updates,
                order_id=self._order.order_id,
                dataset_id=self._order.dataset_id,
                world=self._runtime.world,
                versions={name: version(name) for name in _VERSIONS_OF},
                init_from=self.init_from,
            )
            self._pending = self._writer.submit(self._write, state, tensors, dict(self._values))
        self._stall_seconds += time.monotonic() - started

    @property
    def is_writing(self) -> bool:
        """Whether this process is writing a checkpoint at this moment."""
        return self._pending is not None and not self._pending.done()

    def finish(self) -> bool:
        """Wait for the last save; return whether it succeeded."""
        self._collect()
        return self._runtime.broadcast(self._last_worked)

    def read(self) -> dict[str, float]:
        """Return what to log: failures since this start, and seconds since the last call."""
        if not self.is_writing:
            self._collect()
        values = {
            "checkpoint/failures": self._num_failures,
            "perf/checkpoint_stall_seconds": self._stall_seconds,
            "perf/checkpoint_write_seconds": self._write_seconds,
        }
        self._stall_seconds = self._write_seconds = 0.0
        return values

    def close(self) -> None:
        """Wait for a save that is being written."""
        self._writer.shutdown()

    def _collect(self) -> None:
        """Wait for the save that is being written, if any, and record its result."""
        if self._pending is None:
            return
        try:
            self._write_seconds += self._pending.result()
            self._last_worked = True
        except OSError as error:
            self._last_worked = False
            self._num_failures += 1
            warn(
                f"a checkpoint could not be saved ({error}); training goes on, and older "
                "checkpoints are kept"
            )
        finally:
            self._pending = None

    def _write(self, state: RunState, tensors: FullState, values: dict[int, float]) -> float:
        """Write, publish and retain; return the seconds that it took."""
        started = time.monotonic()
        save_checkpoint(self._directory, state, tensors)
        try:
            retain(self._directory, self._config.keep, values)
        except OSError as error:  # such as NFS's while another process reads it
            warn(f"an old checkpoint could not be removed ({error}); the new one is saved")
        return time.monotonic() - started


def newest_verified(directory: Path, runtime: Runtime) -> Path | None:
    """Return the newest checkpoint that verifies on every process, if any; a collective.

    Damaged checkpoints are set aside. If only another process sees damage, its view of a shared
    disk may be late: it tries again for some seconds.
    """
    num_tries = 0
    while True:
        found = list_checkpoints(directory) if runtime.is_main else []
        path: Path | None = runtime.broadcast(found[0] if found else None)
        if path is None:
            return None
        try:
            verify_checkpoint(path)
            problem = None
        except DamagedCheckpointError as error:
            problem = str(error)
        if not runtime.any(problem is not None):
            return path
        num_tries += 1
        if runtime.broadcast(problem is None and num_tries < NUM_TRIES):
            time.sleep(RETRY_SECONDS)
            continue
        num_tries = 0
        if runtime.is_main:
            set_aside(path, problem or "it does not verify on another process")


def newest_state(directory: Path) -> tuple[Path, RunState] | None:
    """Return the newest checkpoint with a readable state, and the state."""
    for path in list_checkpoints(directory):
        try:
            return path, read_state(path)
        except (OSError, ValueError, TypeError):
            continue  # damaged: `newest_verified` warns and sets it aside
    return None


def check_order(directory: Path, order: Mixture) -> None:
    """Raise UserError if the newest readable checkpoint belongs to other data or another order."""
    newest = newest_state(directory)
    if newest is not None:
        path, state = newest
        _check_data(state, order, path)


def _check_data(state: RunState, order: Mixture, path: Path) -> None:
    run_dir = path.parent.parent
    if state.dataset_id != order.dataset_id:
        free = next(n for n in count(2) if not Path(f"{run_dir}-{n}").exists())
        raise UserError(
            f"{path} was trained on another data set (id {state.dataset_id}, now "
            f"{order.dataset_id}). If that one lies elsewhere, name its place by data.path. If it "
            "grew or changed, this run cannot go on, because its order of samples is over: start "
            f"a new run from its weights, by the same command with run_dir={run_dir}-{free} "
            f"init_from={run_dir}"
        )
    if state.order_id != order.order_id:
        raise UserError(
            f"{path} was trained on another order of samples (id {state.order_id}, now "
            f"{order.order_id}): the rule of the splits, data.split, data.lanes, data.interleave, "
            "data.window or seed have changed. Restore them, or start a new run from its weights: "
            f"set another run_dir, and init_from to {run_dir}."
        )
