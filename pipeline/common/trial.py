"""`{trial}` in a run directory: the id of a W&B sweep's trial.

`wandb agent` starts every trial of a sweep by the same command, but for the settings that it
chooses. So `run_dir: runs/sweep/{trial}` gives each trial a directory of its own, and the same one
when that trial is started again.
"""

import os
import re

PLACEHOLDER = "{trial}"
VARIABLE = "WANDB_RUN_ID"  # the agent sets it


def with_trial(path: str) -> str:
    """Fill the trial's id into a path; raises ValueError if there is none."""
    if PLACEHOLDER not in path:
        return path
    trial = os.environ.get(VARIABLE, "")
    if not re.fullmatch(r"[\w-][\w.-]*", trial):
        what = f"is {trial!r}, which cannot name a directory" if trial else "is not set"
        raise ValueError(
            f"{path} holds {PLACEHOLDER}, the id of a trial of a W&B sweep, but {VARIABLE} {what}: "
            "start the trial by `wandb agent`, or give another run_dir"
        )
    return path.replace(PLACEHOLDER, trial)
