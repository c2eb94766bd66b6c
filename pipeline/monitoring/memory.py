"""Peak memory of a run, the largest of its processes: allocated on the GPU, or resident."""

import re
from collections.abc import Mapping
from pathlib import Path

import torch

from pipeline.distributed.runtime import Runtime

DEVICE_PEAK = "perf/device_memory_peak_bytes"
PROCESS_PEAK = "perf/process_memory_peak_bytes"
GIB = 1 << 30
_STATUS = Path("/proc/self/status")


def read_peak(runtime: Runtime) -> dict[str, float]:
    """Return the largest peak of all processes by metric name; a collective.

    On a GPU: bytes allocated by PyTorch, since the last call. On a CPU: resident bytes since the
    process began; only on Linux.
    """
    if runtime.device.type == "cuda":
        name, peak = DEVICE_PEAK, torch.cuda.max_memory_allocated(runtime.device)
        torch.cuda.reset_peak_memory_stats(runtime.device)
    else:
        name, peak = PROCESS_PEAK, resident_peak()
    peaks = [peak for peak in runtime.gather(peak) if peak is not None]
    return {name: max(peaks)} if peaks else {}


def resident_peak() -> int | None:
    """Return the peak of this process's resident memory in bytes; None where it is not known.

    Not by getrusage's ru_maxrss, which includes the peak of the process that started this one.
    """
    if not _STATUS.exists():
        return None
    found = re.search(r"^VmHWM:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    return None if found is None else int(found[1]) << 10


def memory_line(values: Mapping[str, float]) -> str | None:
    """Return the console's line about the peak; None where it is not known."""
    if DEVICE_PEAK in values:
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        return f"peak device memory {values[DEVICE_PEAK] / GIB:.1f} of {total / GIB:.1f} GiB"
    if PROCESS_PEAK in values:
        return f"peak memory of a process {values[PROCESS_PEAK] / GIB:.1f} GiB"
    return None
