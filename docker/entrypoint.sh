#!/usr/bin/env bash
# Prints the versions in this image on stderr, then runs the given command, or `latentmill --help`.
# It imports no package, to be fast, and nothing from the current folder (-P), which is the user's.
set -euo pipefail
python -P - >&2 <<'PYTHON'
import platform
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from runpy import run_path


def installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def cuda() -> str:
    torch = find_spec("torch")
    if torch is None or torch.origin is None:
        return "no torch"
    return run_path(str(Path(torch.origin).with_name("version.py")))["cuda"] or "none (CPU build)"


versions = {"python": platform.python_version(), "torch": installed("torch"), "CUDA": cuda()}
versions |= {name: installed(name) for name in ("accelerate", "deepspeed", "latentmill")}
print(", ".join(f"{name} {value}" for name, value in versions.items()))
PYTHON
if (($# == 0)); then
    set -- latentmill --help
fi
exec "$@"
