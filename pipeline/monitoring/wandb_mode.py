"""Whether W&B is online, offline or off: the config says so, or else W&B's own environment.

W&B is imported only where it is needed, by the main process: the import takes a second.
"""

import os
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pipeline.common.component import Component
from pipeline.common.strict import set_default

# What WANDB_DISABLED may say for yes.
YES = ("y", "yes", "t", "true", "on", "1")
ONLINE = ("online", "run", "shared")  # W&B's words; shared: several programs write one run
OFFLINE = ("offline", "dryrun")


class WandbConfig(Component):
    """Whether and where Weights & Biases keeps the run; null: as W&B's own environment says."""

    # null: as WANDB_MODE or WANDB_DISABLED says, else auto: online when logged in and W&B's server
    # can be reached, offline otherwise.
    mode: Literal["auto", "online", "offline", "disabled"] | None = None
    # The W&B project that the run belongs to; null: WANDB_PROJECT, else latentmill.
    project: str | None = None
    name: str | None = None  # null: WANDB_NAME, else the run directory's name
    # Runs of one group are shown together; null: WANDB_RUN_GROUP, else no group.
    group: str | None = None
    tags: tuple[str, ...] | None = None  # words to find the run by; null: WANDB_TAGS, else none


def wandb_before_version_2(tree: dict[str, Any]) -> None:
    """Fill in the defaults of a config's version 1, which W&B's environment did not change."""
    for name, value in (("mode", "auto"), ("project", "latentmill"), ("tags", [])):
        set_default(tree, f"monitor.wandb.{name}", value)


class Choice(NamedTuple):
    """What was chosen, and why."""

    mode: Literal["online", "shared", "offline", "disabled"]
    reason: str
    is_problem: bool = False  # it is not what was asked for


def off_by(config: WandbConfig) -> str | None:
    """Return why W&B is off, without importing it; None if it may be on."""
    if config.mode is not None:
        return "monitor.wandb.mode=disabled" if config.mode == "disabled" else None
    if os.environ.get("WANDB_MODE") == "disabled":
        return "WANDB_MODE=disabled"
    disabled = os.environ.get("WANDB_DISABLED", "")
    return f"WANDB_DISABLED={disabled}" if disabled.lower() in YES else None


def choose(config: WandbConfig) -> Choice:
    """Log in if W&B is to be online; waits for its server for at most 10 s (WANDB_HTTP_TIMEOUT)."""
    if off := off_by(config):
        return Choice("disabled", off)
    wandb: Any = import_module("wandb")
    try:
        settings = wandb.setup().settings
    except Exception as error:  # noqa: BLE001 - whatever W&B does not like about its environment
        return Choice("disabled", f"W&B refuses its settings: {in_words(error)}", is_problem=True)
    variable = os.environ.get("WANDB_MODE")
    asked = config.mode or variable
    mode = asked or settings.mode
    said_by = f"monitor.wandb.mode={mode}" if config.mode else f"WANDB_MODE={mode}"
    if mode == "disabled":
        return Choice("disabled", "`wandb disabled` was typed here; `wandb enabled` turns it on")
    if mode in OFFLINE:
        return Choice("offline", said_by if asked else "`wandb offline` was typed here")
    if settings.mode not in ONLINE:
        wandb.setup(wandb.Settings(mode="online"))  # the config decides
    server = settings.base_url
    try:
        has_key = wandb.login(prompt=False)
    except Exception as error:  # noqa: BLE001 - W&B raises one kind for any reason
        why = in_words(error)
        if "did not respond in time" in why:
            why = "no answer in time"
        return Choice("offline", f"{server} cannot be used: {why}", is_problem=True)
    if not has_key:
        why = f"no key for {server} here, `wandb login` stores one"
        return Choice("offline", why, is_problem=asked in ONLINE)
    return Choice("shared" if mode == "shared" else "online", f"logged in at {server}")


def in_words(error: Exception) -> str:
    """Return an error of W&B in one line."""
    return " ".join(f"{error}".split())[:300] or type(error).__name__


def root_of(run_dir: Path) -> Path:
    """Return the folder that W&B's files lie in."""
    return Path(os.environ.get("WANDB_DIR") or run_dir) / "wandb"
