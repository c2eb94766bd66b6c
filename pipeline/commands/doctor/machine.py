"""Doctor's checks of the machine: batch and processes, memory, disk, clock, strategy, W&B."""

import importlib.util
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from email.utils import parsedate_to_datetime
from functools import cache
from math import prod
from pathlib import Path

import numpy as np
import psutil
import urllib3

from pipeline.commands.doctor.compute import weight_bytes
from pipeline.commands.doctor.finding import DoctorContext, Finding, Findings
from pipeline.common.console import in_bytes
from pipeline.common.files import local_directory
from pipeline.common.strict.dialect import parse
from pipeline.data.index.manifest import without_query
from pipeline.data.order.simulate import memory_bound
from pipeline.data.storage import open_storage
from pipeline.monitoring.wandb_mode import choose, root_of
from pipeline.training.run_directory import check_ranks

MAX_CLOCK_SKEW_SECONDS = 60.0
OURS = ("latentmill", "launch", "pipeline")
CGROUP = Path("/sys/fs/cgroup")


def check_batch(context: DoctorContext) -> Findings:
    """The global batch divides over processes and micro-batches."""
    batch, micro_batches = context.settings.batch_size, context.settings.accumulation
    check_ranks(batch, micro_batches, context.world)
    each = batch // (context.world * micro_batches)
    shares = f"{context.world} processes x accumulation {micro_batches} x {each}"
    yield Finding("batch", "ok", f"{batch} = {shares}")


def check_memory(context: DoctorContext) -> Findings:
    """Memory of the stream, against the free memory of this machine or container."""
    data, world, order = context.settings.data, context.world, context.order
    if order is None or context.settings.batch_size % world:
        return
    encoded = 0.0
    for part, (_, index) in zip(order.orders, context.indexes, strict=True):
        mean_bytes = sum(shard.bytes for shard in index.shards) / max(index.num_samples, 1)
        # All slots of a rank may come from one data set of a mixture.
        encoded += memory_bound(part, world if len(order.orders) == 1 else 1, mean_bytes)
    slots = context.settings.batch_size // world
    each = prod(data.decode.buffer_shape) * np.dtype(data.decode.stored_dtype).itemsize
    decoded = (data.prefetch + 1) * slots * each
    needed, free = encoded + decoded, _free_memory()
    text = (
        f"the stream holds at most {in_bytes(needed)} per process (windows {in_bytes(encoded)}, "
        f"decoded batches {in_bytes(decoded)}); {in_bytes(free)} are free"
    )
    if needed > free:
        remedy = "lower data.window (another order), data.prefetch or batch_size"
        yield Finding("memory", "FAIL", f"{text}: {remedy}, or use more processes or memory")
    elif needed * world > free:
        fitting = int(free // needed)
        yield Finding("memory", "warning", f"{text}, enough for {fitting} processes here")
    else:
        yield Finding("memory", "ok", text)


def check_disk(context: DoctorContext) -> Findings:
    """The run directory is writable, and has space for the checkpoints."""
    run_dir = local_directory(context.settings.run_dir, "run_dir")
    folder = next(path for path in (run_dir, *run_dir.absolute().parents) if path.is_dir())
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"doctor")
    except OSError as error:
        text = f"{folder} cannot be written to ({error.strerror}): set another run_dir"
        yield Finding("disk", "FAIL", text)
        return
    config = context.config
    if config is None:
        return
    # Weights, AdamW's two moments, their average.
    one = weight_bytes(config) * (3 + (config.ema_decay is not None))
    kept = config.checkpoint.keep.at_most(config.total_samples)
    needed, free = one * (kept + 1), shutil.disk_usage(folder).free
    text = (
        f"{kept} checkpoints of {in_bytes(one)} and one being written need "
        f"{in_bytes(needed)} in {run_dir}; {in_bytes(free)} are free"
    )
    remedy = ": make room, set another run_dir, or lower checkpoint.keep"
    yield Finding("disk", "ok" if needed < free else "FAIL", text + remedy * (needed >= free))


def check_clock(context: DoctorContext) -> Findings:
    """The clock agrees with that of the server that holds the shards."""
    for source, index in context.indexes:
        # A file's time is no clock: whoever made the file may have set it. S3 refuses requests with
        # a wrong time, so that the check of the shards fails.
        if not source.root.startswith(("http://", "https://")):
            continue
        with closing(open_storage(source.root, context.remote)) as storage:
            url = storage.where(index.shards[0].name)
        try:
            answer = urllib3.request("HEAD", url, timeout=10, retries=False)
            there = parsedate_to_datetime(answer.headers["Date"]).timestamp()
            there += int(answer.headers.get("Age", "0"))  # of a cache's copy of the answer
        except (urllib3.exceptions.HTTPError, KeyError, ValueError) as error:
            text = f"{url} does not send its time ({type(error).__name__})"
            yield Finding("clock", "warning", f"{text}: compare the clocks by hand")
            continue
        skew, what = time.time() - there, f"the server of {without_query(source.root)}"
        side = f"{abs(skew):,.0f} s {'behind' if skew < 0 else 'ahead of'} {what}"
        if abs(skew) > MAX_CLOCK_SKEW_SECONDS:
            yield Finding("clock", "FAIL", f"this machine is {side}: set its clock (NTP)")
        else:
            yield Finding("clock", "ok", f"no more than a minute off {what}")


def check_wandb(context: DoctorContext) -> Findings:
    """Where W&B writes metrics, and why; tries to log in, as the training will."""
    if context.config is None:
        return
    mode, reason, is_problem = choose(context.config.monitor.wandb)
    text = f"{'off' if mode == 'disabled' else mode} ({reason})"
    if mode == "offline":
        pieces = root_of(Path(context.settings.run_dir)) / "offline-run-*"
        text += f"; `wandb sync {pieces}` uploads later"
    yield Finding("wandb", "warning" if is_problem else "ok", text)


def check_strategy(context: DoctorContext) -> Findings:
    """What the launch needs can be imported."""
    modules, how = ["accelerate"], "pip install 'latentmill[train]'"
    if context.topology is not None:
        topology, problems = parse(context.topology.read_text())
        if problems or not isinstance(topology, dict):
            yield Finding("strategy", "FAIL", f"{context.topology} is no accelerate config file")
            return
        if topology.get("distributed_type") == "DEEPSPEED":
            modules += ["deepspeed", "transformers", "ninja"]
            how = "pip install 'latentmill[deepspeed]'"
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        yield Finding("strategy", "FAIL", f"{', '.join(missing)} not installed: {how}")
        return
    reason = _import_error(tuple(modules))
    if reason:
        yield Finding("strategy", "FAIL", f"importing {', '.join(modules)}: {reason}; {how}")
    else:
        yield Finding("strategy", "ok", f"{', '.join(modules)} can be imported")


def check_names(_: DoctorContext) -> Findings:
    """Warn of files in the current folder that have the names of our packages.

    `python -m` imports from the current folder first, before any of our code runs.
    """
    here = Path.cwd()
    if here == Path(__file__).parents[3]:
        return
    names = [f"{name}{end}" for name in OURS for end in (".py", "/__init__.py")]
    found = [name for name in names if (here / name).is_file()]
    if found:
        text = (
            f"{', '.join(found)} in this folder would be run by `python -m` and `accelerate launch "
            "-m` instead of ours: use `latentmill train`, or rename it"
        )
        yield Finding("names", "warning", text)


@cache
def _import_error(modules: tuple[str, ...]) -> str:
    """The error of importing the modules in a new process; empty if there is none."""
    argv = [sys.executable, "-c", f"import {', '.join(modules)}"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=300)
    return done.stderr.strip().splitlines()[-1] if done.returncode else ""


def _free_memory() -> float:
    """Bytes that this machine, or the container around us, has left."""
    free = float(psutil.virtual_memory().available)
    try:
        limit = (CGROUP / "memory.max").read_text().strip()
        used = int((CGROUP / "memory.current").read_text())
    except OSError:
        return free
    return free if limit == "max" else min(free, float(limit) - used)
