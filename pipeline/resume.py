"""Checkpoints of a running job: all processes save together and agree on what they resume from.

`checkpoint` owns the directory protocol of one process; here stand the collectives around it.
"""

import sys
from importlib.metadata import version
from pathlib import Path

from pipeline.checkpoint import (
    DamagedCheckpointError,
    RunState,
    list_checkpoints,
    quarantine,
    read_state,
    read_tensors,
    retain,
    save_checkpoint,
    verify_checkpoint,
)
from pipeline.data.order.mixture import Mixture
from pipeline.errors import UserError
from pipeline.runtime import Runtime
from pipeline.strategies.base import Strategy

_VERSIONS_OF = ("latentmill", "torch", "accelerate", "numpy", "safetensors")


def save(
    directory: Path, strategy: Strategy, *, step: int, order: Mixture, keep: int, runtime: Runtime
) -> bool:
    """Save the state after `step` global batches; tell whether that worked; a collective.

    A full or broken disk costs this checkpoint, not the run: it is reported, and older checkpoints
    stay.
    """
    tensors = strategy.full_state()
    problem: str | None = None
    if runtime.is_main:
        state = RunState(
            step=step,
            position=step * order.batch_size,
            num_updates=tensors.num_updates,
            order_id=order.order_id,
            dataset_id=order.dataset_id,
            world=runtime.world,
            versions={name: version(name) for name in _VERSIONS_OF},
        )
        try:
            save_checkpoint(directory, state, tensors)
            retain(directory, keep=keep)
        except OSError as error:
            problem = str(error)
            print(
                f"warning: the checkpoint of step {step} could not be saved ({problem}); training "
                "goes on, and older checkpoints are kept",
                file=sys.stderr,
                flush=True,
            )
    return runtime.from_main(problem) is None


def restore_newest(directory: Path, strategy: Strategy, *, order: Mixture, runtime: Runtime) -> int:
    """Restore the newest checkpoint that verifies everywhere, return its step; a collective.

    Without a checkpoint the initial state stays, and the step is 0. Raises UserError if the
    checkpoint belongs to other data or another order.
    """
    while True:
        found = list_checkpoints(directory) if runtime.is_main else []
        path: Path | None = runtime.from_main(found[0] if found else None)
        if path is None:
            return 0
        try:
            verify_checkpoint(path)
            problem = None
        except DamagedCheckpointError as error:
            problem = str(error)
        if not runtime.any(problem is not None):
            break
        if runtime.is_main:
            quarantine(path, problem or "it does not verify on another process")
    state = read_state(path)
    _check_data(state, order, path)
    strategy.load_full_state(read_tensors(path))
    return state.step


def check_order(directory: Path, order: Mixture) -> None:
    """Raise UserError if the newest readable checkpoint belongs to other data or another order."""
    for path in list_checkpoints(directory):
        try:
            state = read_state(path)
        except (OSError, ValueError, TypeError):
            continue  # damaged: `restore_newest` says so and sets it aside
        _check_data(state, order, path)
        return


def _check_data(state: RunState, order: Mixture, path: Path) -> None:
    for name, saved, now in (
        ("data set", state.dataset_id, order.dataset_id),
        ("order of samples", state.order_id, order.order_id),
    ):
        if saved != now:
            raise UserError(
                f"{path} was trained on another {name} (id {saved}, now {now}): the shards or "
                "data.split, data.lanes, data.interleave, data.window or seed have changed. "
                "Restore them, or start anew in another run_dir."
            )
