"""Checks of the launcher's variables, and the rendezvous of a run's processes.

`accelerate launch` (by torchrun) gives every process WORLD_SIZE, RANK, MASTER_ADDR and MASTER_PORT.
A mistake in them ends with one paragraph. Without these checks a process would train alone, or wait
half an hour for the others.
"""

import json
import os
import socket
import sys
import threading
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist

from pipeline.common.errors import WRONG_USE, UserError
from pipeline.common.leaving import let_speaker_end_first

DEVICE = "LATENTMILL_DEVICE"  # `launch` sets it
HOW_TO_LAUNCH = (
    "`latentmill train CONFIG --processes N` starts them together, and so does `accelerate launch` "
    "with a topology file, such as the one that `latentmill config cpu-ddp` prints."
)
RENDEZVOUS_SECONDS = 8.0  # timeout on one machine without torchrun: its processes start together
LATE_SECONDS = 60.0  # then a warning; with torchrun or several machines, which may be slow
STORE_SECONDS = 30.0  # timeout of a connection to torchrun on another machine
_THIS_MACHINE = ("localhost", "127.0.0.1", "::1")
_PRECISIONS = ("fp16", "bf16", "amp", "torch_autocast")  # sections of DeepSpeed's JSON
_HOW_TO_CHOOSE = "set `precision` (fp32 or bf16; there is no fp16) in the config"
_OF_MPI = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")  # accelerate reads these


def check_announced(environment: Mapping[str, str]) -> None:
    """Raise UserError if the launcher's variables contradict each other or the run's config."""
    world, rank = _number(environment, "WORLD_SIZE", 1), _number(environment, "RANK", 0)
    missing = [n for n in ("RANK", "MASTER_ADDR", "MASTER_PORT") if n not in environment]
    if world > 1 and missing:
        raise UserError(
            f"WORLD_SIZE announces {world} processes, but {', '.join(missing)} is not set: they "
            f"cannot find each other. {HOW_TO_LAUNCH}"
        )
    if not 0 <= rank < world:
        raise UserError(
            f"RANK is {rank}, but WORLD_SIZE announces {world} processes, with ranks from 0 to "
            f"{world - 1}. {HOW_TO_LAUNCH}"
        )
    # With use_cpu, `accelerate launch` starts one process, whatever --num_processes says.
    is_launched = "ACCELERATE_MIXED_PRECISION" in environment
    is_alone = not environment.keys() & {"WORLD_SIZE", *_OF_MPI}
    if is_launched and is_alone and "MASTER_ADDR" in environment:
        raise UserError(
            "accelerate was told where several processes meet (MASTER_ADDR), but has started only "
            "this one: with --cpu, or use_cpu in the topology file, it never starts more. "
            f"{HOW_TO_LAUNCH} For one process, take --num_processes 1 and unset MASTER_ADDR."
        )
    _check_precision(environment)


def check_device(environment: Mapping[str, str], *, has_gpu: bool) -> None:
    """Raise UserError if `python -m launch` was asked for GPUs, and this process sees none."""
    if environment.get(DEVICE) == "gpu" and not has_gpu:
        raise UserError(
            f"--device gpu ({DEVICE}), but PyTorch {torch.__version__} sees no GPU on "
            f"{socket.gethostname()}: check the driver (nvidia-smi) and CUDA_VISIBLE_DEVICES, and "
            "that PyTorch is no CPU build; or launch with --device cpu."
        )


def check_launcher(environment: Mapping[str, str]) -> None:
    """Raise UserError if torchrun, which keeps the rendezvous store, has died."""
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    address = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    try:
        socket.create_connection(address, timeout=STORE_SECONDS).close()
    except OSError as error:
        raise UserError(
            f"nobody answers at {address[0]}:{address[1]} (MASTER_ADDR, MASTER_PORT), where the "
            f"launcher waits for its processes ({error}): has it been killed?"
        ) from error


@contextmanager
def rendezvous(environment: Mapping[str, str]) -> Generator[None]:
    """Join the other processes inside the context, and report if they do not all come.

    Processes of one machine that no torchrun started wait for RENDEZVOUS_SECONDS at most. Raises
    UserError if they cannot meet.
    """
    world, rank = _number(environment, "WORLD_SIZE", 1), _number(environment, "RANK", 0)
    address = f"{environment.get('MASTER_ADDR')}:{environment.get('MASTER_PORT')}"
    announced = f"WORLD_SIZE announces {world} processes, of which this is process {rank}"
    is_limited = not _has_torchrun(environment)
    is_limited &= environment.get("MASTER_ADDR") in _THIS_MACHINE
    seconds = RENDEZVOUS_SECONDS if is_limited else LATE_SECONDS

    def report_timeout() -> None:
        late = f"they have not all come to {address} (MASTER_ADDR, MASTER_PORT)"
        text = f"{announced}, but after {seconds:g} s {late}"
        if is_limited:
            print(f"error: {text}. {HOW_TO_LAUNCH}", file=sys.stderr, flush=True)
            os._exit(WRONG_USE)  # torch waits in C++, and cannot be interrupted
        print(f"warning: {text}; still waiting", file=sys.stderr, flush=True)

    timer = threading.Timer(seconds, report_timeout)
    timer.daemon = True
    if world > 1:
        timer.start()
    try:
        yield
    except dist.DistError as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"{announced}, but it cannot meet the others at {address} (MASTER_ADDR, MASTER_PORT): "
            f"{reason}. Take an address of the machine of process 0 that all can reach, and a "
            "port that is free there."
        ) from error
    finally:
        timer.cancel()


def print_error(error: UserError, environment: Mapping[str, str]) -> None:
    """Print the error; usually all ranks have the same one, and rank 0 comes first."""
    if environment.get("RANK", "0") != "0":
        let_speaker_end_first(environment)
    print(f"error: {error}", file=sys.stderr, flush=True)


def _check_precision(environment: Mapping[str, str]) -> None:
    precision = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision != "no":
        raise UserError(
            f"accelerate is told to use mixed precision {precision!r} (mixed_precision in the "
            "topology file, --mixed_precision, or ACCELERATE_MIXED_PRECISION), but the run's "
            f"config decides the precision: leave it out there, and {_HOW_TO_CHOOSE}."
        )
    path = Path(environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", ""))
    try:
        config: Any = json.loads(path.read_bytes())
    except (OSError, ValueError):  # no such file, or DeepSpeed will report it
        return
    if not isinstance(config, dict):
        return
    given = cast(dict[str, Any], config)
    sections = [name for name in _PRECISIONS if _is_enabled(given.get(name))]
    if sections:
        raise UserError(
            f"{path} enables {', '.join(sections)}, but the run's config decides the precision: "
            f"leave that out there, and {_HOW_TO_CHOOSE}."
        )


def _is_enabled(section: Any) -> bool:
    return isinstance(section, dict) and bool(cast(dict[str, Any], section).get("enabled"))


def _has_torchrun(environment: Mapping[str, str]) -> bool:
    return "TORCHELASTIC_RUN_ID" in environment  # also under `accelerate launch`, by torchrun


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name, str(default))
    if not text.isdecimal():
        raise UserError(f"{name} is {text!r}, which is no number. {HOW_TO_LAUNCH}")
    return int(text)
