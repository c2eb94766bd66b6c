"""Doctor's checks of GPUs, of memory against a step, and of threads against cores."""

import json
from pathlib import Path

import psutil
import torch

from pipeline.commands.doctor.finding import DoctorContext, Finding, Findings
from pipeline.common.console import in_bytes, plural
from pipeline.common.precision import parameter_dtype
from pipeline.common.shipped import find
from pipeline.common.strict.dialect import parse
from pipeline.config import TrainConfig
from pipeline.models.autoencoder import AutoEncoder, num_parameters
from pipeline.training.memory import ADVISED, StepMemory

# Warn if more than this share of the cores neither decodes nor computes.
IDLE_SHARE = 0.5


def weight_bytes(config: TrainConfig) -> int:
    """Return the bytes of the trained autoencoder's parameters."""
    with torch.device("meta"):
        model = AutoEncoder(config.model, config.data.decode.event_shape)
    return num_parameters(model) * parameter_dtype(config.precision).itemsize


def check_device(context: DoctorContext) -> Findings:
    """The GPUs, and their memory; or the CPU."""
    count, asked = torch.cuda.device_count(), context.device
    if asked == "cpu" or (asked == "auto" and not count):
        why = "--device cpu" if asked == "cpu" else "PyTorch sees no GPU here"
        yield Finding("device", "ok", f"the CPU computes: {why}")
        return
    if not count:
        yield Finding(
            "device",
            "FAIL",
            f"--device gpu, but PyTorch {torch.__version__} sees no GPU here: look at nvidia-smi "
            "and CUDA_VISIBLE_DEVICES, install a build of PyTorch for your GPU, or use another "
            "--device",
        )
        return
    name, (free, total) = torch.cuda.get_device_name(), torch.cuda.mem_get_info()
    text = f"{count} x {name}, {in_bytes(free)} of {in_bytes(total)} free on the first"
    if context.world > count:
        text += f": fewer than the {context.world} processes, if all run here"
        yield Finding("device", "warning", f"{text}; set --processes to {count}")
        return
    yield Finding("device", "ok", text)


def check_step(context: DoctorContext) -> Findings:
    """Whether a step fits into a card of --card-gb, the GPU here, or this machine's memory."""
    if context.config is None:
        return
    memory = StepMemory(context.config, world=context.world, stage=zero_stage(context.topology))
    if context.card_gb is not None:
        room, where = int(context.card_gb * 1e9), f"a card of {context.card_gb:g} GB"
    elif context.device != "cpu" and torch.cuda.device_count():
        room = torch.cuda.get_device_properties(0).total_memory
        where = f"{torch.cuda.get_device_name()} of {in_bytes(room)}"
    else:
        room = psutil.virtual_memory().available
        where = f"the {in_bytes(room)} that are available here"
    text = f"{memory.in_words()} of {where}"
    if memory.total <= ADVISED * room:
        yield Finding("step", "ok", text)
    else:
        verdict = "FAIL" if memory.total > room else "warning"
        what = "does not fit" if memory.total > room else "leaves little for all else"
        yield Finding("step", verdict, f"{text}, which {what}: {memory.remedy(room)}")


def zero_stage(topology: Path | None) -> int:
    """Return the stage of ZeRO that accelerate's file chooses; 0 for DDP."""
    tree, _ = parse(topology.read_text()) if topology is not None else ({}, [])
    if not isinstance(tree, dict) or tree.get("distributed_type") != "DEEPSPEED":
        return 0
    section = tree.get("deepspeed_config") or {}
    if (file := section.get("deepspeed_config_file")) is None:
        return int(section.get("zero_stage", 2))  # accelerate's default
    path = Path(file) if Path(file).is_file() else find("deepspeed", Path(file).name)
    return int(json.loads(path.read_text())["zero_optimization"]["stage"])


def check_threads(context: DoctorContext) -> Findings:
    """Threads that decode and compute, against the available cores."""
    cores, threads = len(psutil.Process().cpu_affinity() or []), context.settings.data.threads
    text = f"{plural(context.world, 'process')} x data.threads {threads}, {cores} cores here"
    computes = context.device == "cpu" or not torch.cuda.device_count()
    idle = cores - context.world * (threads + computes)  # a process computes with one thread
    if threads > cores:
        remedy = "more threads than cores decode no faster; set data.threads to at most the cores"
        yield Finding("threads", "warning", f"{text}: {remedy} of one process")
    elif threads * context.world > cores:
        yield Finding("threads", "warning", f"{text}: too many if all processes run here")
    elif idle <= IDLE_SHARE * cores:
        yield Finding("threads", "ok", text)
    elif computes:
        size = context.settings.batch_size // context.settings.accumulation
        fitting = max(n for n in range(1, cores + 1) if size % n == 0)
        yield Finding(
            "threads",
            "warning",
            f"{text}, and one thread of each computes (OMP_NUM_THREADS 1): {idle} cores idle; set "
            f"--processes to {fitting}",
        )
    else:
        yield Finding(
            "threads",
            "warning",
            f"{text}: {idle} cores idle; set data.threads to {cores // context.world - 1}",
        )
