"""The run directory: config, lock and state of a run.

config.yaml        the resolved config, a valid input as well
metrics.jsonl      every logged value
checkpoints/       see `checkpoints.folder`
images/  wandb/    see `monitoring.monitor`
evaluations/       what the evaluations measure, and results of others: see `evaluation.card`
quarantine.jsonl   bad samples, once each
changes.jsonl      settings changed on a resume by --accept-change
locations.json     where the newest start found run and data: see `training.locations`
outcome.json       how the last start ended, and failure/ if it failed: see `distributed.outcome`
"""

import fcntl
import json
import os
import re
import socket
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from pipeline.checkpoints.folder import (
    is_whole,
    list_checkpoints,
    read_weights,
    remove_unfinished,
)
from pipeline.checkpoints.manager import check_order, newest_state
from pipeline.common import strict
from pipeline.common.errors import UserError
from pipeline.common.files import write_atomic
from pipeline.config import TrainConfig
from pipeline.data.order.mixture import Mixture
from pipeline.distributed.outcome import Failures, begin
from pipeline.distributed.runtime import Runtime
from pipeline.losses.players import checkpoint_name
from pipeline.metrics.settings import UNNAMED
from pipeline.training.build import build_trained
from pipeline.training.evaluated import EvaluatedSet, check_evaluated
from pipeline.training.loading import check_shapes, load_config
from pipeline.training.locations import SeenDataSet, read_locations, record_locations

# Where data lies. It may change if the data set is the same one: `check_order`, `_was_seen`.
DATA_PLACE = re.compile(r"data\.(mixture\.\d+\.)?(path|shards)")
# The same of data that is only evaluated: `check_evaluated`.
EVALUATED_PLACE = re.compile(r"evaluation\.data\.(?:(\w+)\.)?(path|shards)")


def lock_run_dir(
    config: TrainConfig,
    accepted: Sequence[str],
    order: Mixture,
    evaluated: Sequence[EvaluatedSet] = (),
) -> IO[bytes]:
    """Lock the run directory, store the config and return the lock; for the main process only.

    Raises UserError if the directory cannot be written, if another process runs there, if its run
    has a config that differs in more than `may_change` and `accepted`, or another order of samples.
    """
    run_dir = Path(config.run_dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = (run_dir / "lock").open("a+b")
    except OSError as error:
        raise UserError(
            f"cannot write to the run directory {run_dir}: {error.strerror}. Set run_dir to a "
            "directory that you can write to."
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = (run_dir / "lock").read_text() or "another process"
        lock.close()
        raise UserError(
            f"{holder} is running in {run_dir}. Wait for it, stop it (touch {run_dir}/STOP), or "
            "set another run_dir."
        ) from None
    except OSError as error:
        lock.close()
        raise UserError(
            f"{run_dir} cannot be locked against a second job: {error.strerror}. Take a run_dir "
            "on a file system that has locks (NFS: mount it without nolock)."
        ) from error
    try:
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        lock.flush()
        _store_config(run_dir, config, accepted, order, evaluated)
        (run_dir / "STOP").unlink(missing_ok=True)
        remove_unfinished(run_dir / "checkpoints")
    except BaseException:
        lock.close()
        raise
    return lock


def _store_config(
    run_dir: Path,
    config: TrainConfig,
    accepted: Sequence[str],
    order: Mixture,
    evaluated: Sequence[EvaluatedSet],
) -> None:
    path = run_dir / "config.yaml"
    if path.exists():
        former = load_config(run_dir).resolved()
        changes = [c for c in strict.difference(former, config) if c.path != "version"]
        if newest_state(run_dir / "checkpoints") is not None or _was_seen(run_dir, order):
            changes = [c for c in changes if not DATA_PLACE.fullmatch(c.path)]
        locations = read_locations(run_dir)
        known = {} if locations is None else locations.evaluated
        changes = [c for c in changes if not _is_known_place(c.path, known)]
        _check_changes(run_dir, changes, config.may_change, accepted)
        strangers = [one for one in evaluated if not _covered(one.setting, accepted)]
        check_evaluated(run_dir, known, strangers)
        check_order(run_dir / "checkpoints", order)
        recorded = [change for change in changes if not _covered(change.path, config.may_change)]
        if recorded:
            newest = next(iter(list_checkpoints(run_dir / "checkpoints")), None)
            if newest is not None:
                _check_weights(run_dir, config)
            with (run_dir / "changes.jsonl").open("a", encoding="utf-8") as file:
                for change in recorded:
                    entry = {"checkpoint": newest.name if newest else None, **change._asdict()}
                    file.write(json.dumps(entry) + "\n")
                os.fsync(file.fileno())
    write_atomic(path, strict.dump(config).encode())
    record_locations(run_dir, order, {one.name: one.seen for one in evaluated})


def _is_known_place(setting: str, known: Mapping[str, SeenDataSet]) -> bool:
    """Whether a setting is the location of data that an earlier start evaluated."""
    match = EVALUATED_PLACE.fullmatch(setting)
    return match is not None and (match[1] or UNNAMED) in known


def _was_seen(run_dir: Path, order: Mixture) -> bool:
    """Whether an earlier start, which may have saved nothing yet, read the same data."""
    locations = read_locations(run_dir)
    return locations is not None and locations.dataset_id == order.dataset_id


def _check_weights(run_dir: Path, config: TrainConfig) -> None:
    """Raise UserError unless the newest valid checkpoint's weights fit the config's model."""
    directory = run_dir / "checkpoints"
    path = next((path for path in list_checkpoints(directory) if is_whole(path)), None)
    if path is None:  # all are damaged: `manager.newest_verified` warns and sets them aside
        return
    model = build_trained(config).state_dict()
    what = f"{path} holds weights of another model than the changed config"
    named = {checkpoint_name(name): tensor for name, tensor in model.items()}
    check_shapes(named, read_weights(path, "raw"), what)


def _check_changes(
    run_dir: Path,
    changes: Sequence[strict.Difference],
    may_change: Sequence[str],
    accepted: Sequence[str],
) -> None:
    refused = [c for c in changes if not _covered(c.path, (*may_change, *accepted))]
    if refused:
        lines = [f"  {c.path}: there {c.left!r}, now {c.right!r}" for c in refused]
        flags = " ".join(f"--accept-change={c.path}" for c in refused)
        raise UserError(
            f"{run_dir} holds a run with another config; a resumed run may change only "
            f"{', '.join(may_change)}:\n"
            + "\n".join(lines)
            + f"\nSet another run_dir (init_from: {run_dir} starts from its weights), give the "
            + f"former values, or, if you mean it, add {flags}"
        )


def _covered(path: str, names: Sequence[str]) -> bool:
    return any(path == name or path.startswith(f"{name}.") for name in names)


@contextmanager
def locked_run_dir(
    config: TrainConfig,
    accepted: Sequence[str],
    order: Mixture,
    evaluated: Sequence[EvaluatedSet],
    runtime: Runtime,
) -> Generator[Failures]:
    """Keep the run directory locked inside the context; yield where to record failures.

    A collective. A UserError of the main process is raised on all.
    """
    run_dir = Path(config.run_dir)
    lock: IO[bytes] | None = None
    attempt: str | None = None
    try:
        with runtime.sharing_errors():
            if runtime.is_main:
                _check_world(config, runtime.world)
                lock = lock_run_dir(config, accepted, order, evaluated)
                attempt = begin(run_dir)
        failures = Failures(run_dir, runtime.broadcast(attempt), runtime.rank, runtime.world)
        with failures.recorded():
            yield failures
    finally:
        if lock is not None:
            lock.close()


def _check_world(config: TrainConfig, world: int) -> None:
    """Raise UserError if the objective depends on the number of processes, which changed."""
    newest = newest_state(Path(config.run_dir) / "checkpoints")
    if config.depends_on_processes and newest is not None and newest[1].world != world:
        terms = [t.kind for t in config.objective.regularisers if t.scope == "micro_batch"]
        raise UserError(
            f"{newest[0]} was trained on {newest[1].world} processes, and now there are {world}: "
            f"the objective's {', '.join(terms)} is computed per micro-batch, so the objective "
            f"depends on the number of processes. Start {newest[1].world} processes, or set "
            "another run_dir."
        )


def check_ranks(batch_size: int, accumulation: int, world: int) -> None:
    """Raise UserError unless processes and micro-batches divide the batch."""
    parts = world * accumulation
    if batch_size % parts:
        fitting = [r for r in range(1, 2 * world + 1) if batch_size % (r * accumulation) == 0]
        nearest = -(-batch_size // parts) * parts
        raise UserError(
            f"batch_size {batch_size} is not divisible by {world} processes x "
            f"accumulation {accumulation} = {parts}. Set batch_size to {nearest}, or use "
            f"{', '.join(map(str, fitting))} processes."
        )
