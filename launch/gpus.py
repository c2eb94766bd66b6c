"""The number of processes and the device, where these are `auto`.

A short process of its own counts the GPUs, so that the launcher holds no CUDA context.
"""

import subprocess
import sys
from pathlib import Path
from typing import Literal

from launch.job import EXPORT, Device, JobError

# Device files of the drivers: NVIDIA, Windows Subsystem for Linux, AMD.
DRIVERS = tuple(map(Path, ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")))


def num_gpus() -> int:
    """The number of GPUs that PyTorch sees, after CUDA_VISIBLE_DEVICES."""
    if not any(driver.exists() for driver in DRIVERS):
        return 0
    code = "import torch; print(torch.cuda.device_count())"
    # -P: nothing is imported from the current folder.
    asked = subprocess.run(
        [sys.executable, "-P", "-c", code], stdout=subprocess.PIPE, text=True, check=False
    )
    if asked.returncode:
        raise JobError(
            "PyTorch cannot count the GPUs of this machine (its error is above): repair it, or "
            "set --processes and --device."
        )
    return int(asked.stdout)


def choose(
    processes: int | Literal["auto"], device: Device | Literal["auto"], module: str
) -> tuple[int, Device, str]:
    """Return processes, device, and a line that says both; raises JobError if they do not fit."""
    if processes != "auto" and processes < 1:
        raise JobError(f"--processes must be at least 1, not {processes}.")
    why = ""
    if device == "auto" or (device == "gpu" and processes == "auto"):
        gpus = num_gpus()
        if gpus == 0 and device == "gpu":
            raise JobError(
                "--device gpu, but PyTorch sees no GPU here: check the driver (nvidia-smi) and "
                "CUDA_VISIBLE_DEVICES, and that PyTorch is no CPU build; or give --device cpu."
            )
        # Processes of an export may share a GPU; those of a training cannot.
        if gpus and processes != "auto" and processes > gpus and module != EXPORT:
            raise JobError(
                f"--processes {processes}, but a training has one process per GPU, of which there "
                f"are {gpus} here: give --processes {gpus}, or --device cpu."
            )
        why = f"; GPUs here: {gpus}" if gpus else "; no GPU here"
        device = "gpu" if gpus else "cpu"
        processes = max(gpus, 1) if processes == "auto" else processes
    elif processes == "auto":
        processes = 1
    many = "1 process" if processes == 1 else f"{processes} processes"
    where = "the CPU" if device == "cpu" else "a GPU" if processes == 1 else "GPUs"
    return processes, device, f"{many} on {where}{why}"
