"""The arithmetic of a run, for training, evaluation and export.

fp32: everything in float32, also on GPUs (no TF32). bf16: parameters, losses and optimizer in
float32, matrix products and convolutions in bfloat16 by autocast. fp64: everything in float64, for
proofs of equality between topologies. fp16 is refused: with DeepSpeed's autocast every step is
skipped without the scaler noticing (docs/facts.md), and bf16 needs no scaler.
"""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator
from torch import Tensor


def _refuse_fp16(value: Any) -> Any:
    if value in ("fp16", "float16"):
        raise ValueError("fp16 is not supported: DeepSpeed's autocast skips its steps; use bf16")
    return value


Precision = Annotated[Literal["fp32", "bf16", "fp64"], BeforeValidator(_refuse_fp16)]


def fix_arithmetic() -> None:
    """Make GPU arithmetic of this process deterministic: equal inputs give equal bits."""
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


@contextmanager
def fixed_arithmetic() -> Generator[None]:
    """Fix it within the context only: for a library, whose process belongs to its user."""
    parts = (
        *((torch.backends.cudnn, name) for name in ("benchmark", "deterministic", "allow_tf32")),
        (torch.backends.cuda.matmul, "allow_tf32"),
    )
    before = [getattr(part, name) for part, name in parts]
    fix_arithmetic()
    try:
        yield
    finally:
        for (part, name), value in zip(parts, before, strict=True):
            setattr(part, name, value)


def parameter_dtype(precision: str) -> torch.dtype:
    """The dtype of parameters, losses and optimizer state."""
    return torch.float64 if precision == "fp64" else torch.float32


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The context in which a model's forward pass runs."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def widen(x: Tensor) -> Tensor:
    """Return x in at least float32, before operations that must not run in bfloat16."""
    return x if x.dtype == torch.float64 else x.float()
