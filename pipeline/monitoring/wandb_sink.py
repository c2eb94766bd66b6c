"""Weights & Biases: its first failure is printed and turns it off; the training goes on.

Offline, every start of a run writes a piece of its own, `wandb/offline-run-*`. The pieces of a run
share an id; a later piece replaces the steps after its start. W&B writes with a delay, so a kill
loses its last steps: the next piece begins where the former pieces end, not where training resumes.
"""

import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import wandb
from PIL import Image

from pipeline.common.component import Component
from pipeline.common.console import warn
from pipeline.common.files import write_atomic
from pipeline.monitoring.wandb_pieces import written_steps

# Timeout of the upload at the end of a run; `wandb sync` sends the rest.
WANDB_FINISH_SECONDS = 600.0

Records = Sequence[Mapping[str, Any]]  # metrics.jsonl: step, time, values


class WandbConfig(Component):
    """Whether and where Weights & Biases keeps the run."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"  # auto: online when logged in
    project: str = "latentmill"  # the W&B project that the run belongs to
    name: str | None = None  # null: the run directory's name
    group: str | None = None  # runs of one group are shown together; null: no group
    tags: tuple[str, ...] = ()  # words to find the run by


class WandbSink:
    """Sends values and pictures to Weights & Biases, until its first failure."""

    def __init__(
        self,
        run_dir: Path,
        config: WandbConfig,
        *,
        resolved: Mapping[str, Any],
        step: int,
        past: Records,
        goes_on: bool = False,
    ) -> None:
        """Open a W&B run that continues at `step`.

        past: the records so far, the last of which W&B may have lost. goes_on: whether more records
        of `step` will follow.
        """
        self._run: Any = None
        self._failed = False
        self._pending: tuple[int, dict[str, Any]] = (-1, {})
        if config.mode != "disabled":
            self._guarded(lambda: self._open(run_dir, config, resolved, step, past, goes_on))

    def _open(
        self,
        run_dir: Path,
        config: WandbConfig,
        resolved: Mapping[str, Any],
        step: int,
        past: Records,
        goes_on: bool,
    ) -> None:
        mode = config.mode
        if mode == "auto":
            mode = "online" if wandb.login(prompt=False) else "offline"
        identity: dict[str, Any] = {"id": wandb_run_id(run_dir)}
        lost: Records = []
        if mode == "online":
            identity["resume"] = "allow"
        elif step > 0:
            # Offline, `resume` is ignored; `resume_from` makes the piece start after that step.
            written = written_steps(run_dir / "wandb")
            first_lost = min(
                (r["step"] for r in past if r["step"] not in written),
                default=step if goes_on else step + 1,
            )
            lost = [record for record in past if record["step"] >= first_lost]
            kept = max((s for s in written if s < first_lost), default=None)
            if kept is not None:
                # wandb refuses resume_from if WANDB_RUN_ID in the environment differs.
                wandb.setup(wandb.Settings(run_id=identity["id"]))
                identity["resume_from"] = f"{identity['id']}?_step={kept}"
        self._run = wandb.init(
            project=config.project,
            name=config.name or run_dir.resolve().name,
            group=config.group,
            tags=config.tags,
            dir=run_dir,
            mode=mode,
            config=dict(resolved),
            settings=wandb.Settings(
                console="off", silent=True, finish_timeout=WANDB_FINISH_SECONDS
            ),
            **identity,
        )
        self._log_again(run_dir / "images", lost)

    def _log_again(self, images: Path, lost: Records) -> None:
        """Send records that no former piece holds, with the pictures of their steps."""
        steps = {record["step"] for record in lost}
        pictures = [
            (int(found[2]), found[1], path)
            for path in sorted(images.glob("*.png"))
            if (found := re.fullmatch(r"(.+)-(\d+)\.png", path.name)) and int(found[2]) in steps
        ]
        for record in lost:
            step = record["step"]
            self.log(step, {k: v for k, v in record.items() if k not in ("step", "time")})
            for _, name, path in (picture for picture in pictures if picture[0] == step):
                with Image.open(path) as image:
                    self.log_image(step, name, image)

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Send values at an explicit step; values of one step are sent together."""
        pending_step, pending = self._pending
        if step != pending_step:
            self._send()
            pending = {}
        self._pending = (step, pending | values)

    def log_image(self, step: int, name: str, image: Image.Image) -> None:
        """Send a picture at an explicit step."""
        if self._run is not None:
            self._guarded(lambda: self.log(step, {f"images/{name}": wandb.Image(image)}))

    def close(self, exit_code: int) -> None:
        """Send pending values and finish the W&B run."""
        self._send()
        if self._run is not None:
            self._guarded(lambda: self._run.finish(exit_code=exit_code))
        if self._failed:
            # Otherwise wandb would print its errors at exit.
            with suppress(Exception):
                wandb.teardown(exit_code=exit_code)

    def _send(self) -> None:
        step, values = self._pending
        if self._run is not None and values:
            self._guarded(lambda: self._run.log(values, step=step, commit=True))

    def _guarded(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # noqa: BLE001 - reported; W&B is turned off
            # Whatever the error is, the training goes on without W&B.
            self._run = None
            self._failed = True
            warn(
                f"W&B failed and is off for the rest of this run ({type(error).__name__}: "
                f"{error}); metrics.jsonl goes on"
            )


def wandb_run_id(run_dir: Path) -> str:
    """Return the id that all pieces of this run share; created at its first start."""
    path = run_dir / "wandb" / "run-id"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        write_atomic(path, uuid.uuid4().hex[:8].encode())
    return path.read_text()
