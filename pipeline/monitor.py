"""What a run says while it runs: `metrics.jsonl` always, W&B beside it, one line on the console.

W&B is a sink that may fail: the first failure is printed once and W&B is left alone from then on.
Offline, every start of a run writes a piece of its own, `wandb/offline-run-*`; pieces of one run
share an id, and a later piece replaces the steps from its own start on. W&B writes late, so a kill
takes its last steps; the next piece begins where the former ones end, not where training goes on.
"""

import json
import os
import re
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import wandb
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field

from pipeline.component import Component
from pipeline.files import write_atomic
from pipeline.wandb_pieces import written_steps

# A run whose upload does not end by then ends without; `wandb sync` sends the rest.
WANDB_FINISH_SECONDS = 600.0

Records = Sequence[Mapping[str, Any]]  # metrics.jsonl: step, time, values


class WandbConfig(Component):
    """Where Weights & Biases runs go."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"  # auto: online when logged in
    project: str = "latentmill"
    name: str | None = None  # null: the run directory's name
    group: str | None = None
    tags: tuple[str, ...] = ()


class MonitorConfig(Component):
    """How often a run reports."""

    log_every_steps: int = Field(default=50, gt=0)
    num_images: int = Field(
        default=8, ge=0
    )  # rows of the picture at every evaluation; 0: no pictures
    wandb: WandbConfig = WandbConfig()


class Monitor:
    """The reports of one run; on any process but the main one, silence."""

    def __init__(
        self,
        run_dir: Path,
        config: MonitorConfig,
        *,
        resolved: Mapping[str, Any],
        step: int,
        num_steps: int,
        is_main: bool,
    ) -> None:
        """Open the sinks; records after `step`, where the run goes on, are cut off.

        resolved: the run's whole config, for W&B. num_steps: length of the run.
        """
        self._is_main = is_main
        if not is_main:
            return
        self._run_dir = run_dir
        self._num_steps = num_steps
        self._last_progress = (step, time.monotonic())
        (run_dir / "images").mkdir(exist_ok=True)
        # A run that begins again at step 0 evaluates there again.
        records = cut_back(run_dir / "metrics.jsonl", step if step > 0 else -1)
        self._file = (run_dir / "metrics.jsonl").open("ab", buffering=0)
        self._unwritten = b""
        self._wandb = WandbSink(run_dir, config.wandb, resolved=resolved, step=step, past=records)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record values at a step; several calls at one step add up to one record per call."""
        if not self._is_main:
            return
        record = {"step": step, "time": round(time.time(), 3), **values}
        # NaN is written as Python's json does, so that a broken number is seen, not lost.
        self._unwritten += json.dumps(record).encode() + b"\n"
        self._write()
        self._wandb.log(step, dict(values))

    def _write(self) -> None:
        """Append what is not written yet, whole or not at all; a full disk only delays it."""
        size = self._file.seek(0, os.SEEK_END)
        try:
            if self._file.write(self._unwritten) == len(self._unwritten):
                self._unwritten = b""
                return
            problem = "only a part fitted"
        except OSError as error:
            problem = str(error)
        self._file.truncate(size)
        warn(f"metrics.jsonl could not be written ({problem}); the next record tries again")

    def picture(self, step: int, name: str, pixels: NDArray[np.uint8]) -> None:
        """Keep a picture [H, W, 3] as images/<name>-<step>.png and in W&B."""
        if not self._is_main:
            return
        image = Image.fromarray(pixels)
        path = self._run_dir / "images" / f"{name}-{step:08d}.png"
        try:
            image.save(path)
        except OSError as error:
            path.unlink(missing_ok=True)
            warn(f"{path} could not be written ({error}); training goes on")
        self._wandb.log_image(step, name, image)

    def progress(self, step: int, values: Mapping[str, float]) -> None:
        """Print the console's line for one log."""
        if not self._is_main:
            return
        former_step, former_time = self._last_progress
        now = time.monotonic()
        self._last_progress = (step, now)
        seconds_per_step = (now - former_time) / max(step - former_step, 1)
        minutes, seconds = divmod(int((self._num_steps - step) * seconds_per_step), 60)
        self.say(
            f"step {step:,}/{self._num_steps:,}  loss {values['train/loss']:.4g}  "
            f"{values['perf/images_per_second']:,.0f} images/s  "
            f"waiting for data {values['perf/data_wait_fraction']:.0%}  "
            f"{minutes}:{seconds:02d} left"
        )

    def say(self, text: str) -> None:
        """Print a line on the console."""
        if self._is_main:
            print(text, file=sys.stderr, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Finish the sinks; W&B shows a run that ends by an exception as failed."""
        if not self._is_main:
            return
        self._file.close()
        self._wandb.close(exit_code=0 if kind is None else 1)


class WandbSink:
    """Weights & Biases behind a fuse."""

    def __init__(
        self,
        run_dir: Path,
        config: WandbConfig,
        *,
        resolved: Mapping[str, Any],
        step: int,
        past: Records,
    ) -> None:
        """Open a run; `past`: its records so far, of which W&B may have lost the last."""
        self._run: Any = None
        self._failed = False
        self._pending: tuple[int, dict[str, Any]] = (-1, {})
        if config.mode != "disabled":
            self._guarded(lambda: self._open(run_dir, config, resolved, step, past))

    def _open(
        self,
        run_dir: Path,
        config: WandbConfig,
        resolved: Mapping[str, Any],
        step: int,
        past: Records,
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
                (r["step"] for r in past if r["step"] not in written), default=step + 1
            )
            lost = [record for record in past if record["step"] >= first_lost]
            kept = max((s for s in written if s < first_lost), default=None)
            if kept is not None:
                # A WANDB_RUN_ID of the environment would contradict it in wandb's own check.
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
        """Send records, with the pictures of their steps, that no former piece holds."""
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
        """Send what is left and finish the run."""
        self._send()
        if self._run is not None:
            self._guarded(lambda: self._run.finish(exit_code=exit_code))
        if self._failed:
            # Now, while its errors can be silenced: at exit wandb would print them.
            with suppress(Exception):
                wandb.teardown(exit_code=exit_code)

    def _send(self) -> None:
        step, values = self._pending
        if self._run is not None and values:
            self._guarded(lambda: self._run.log(values, step=step, commit=True))

    def _guarded(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # noqa: BLE001 - reported, and the sink is cut off
            # Whatever W&B's reason is, the training is worth more: say it once and go on without.
            self._run = None
            self._failed = True
            warn(
                f"W&B failed and is off for the rest of this run ({type(error).__name__}: "
                f"{error}); metrics.jsonl goes on"
            )


def warn(text: str) -> None:
    """Print a warning on the console."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


def wandb_run_id(run_dir: Path) -> str:
    """Return the id that all pieces of this run share, made at its first start."""
    path = run_dir / "wandb" / "run-id"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        write_atomic(path, uuid.uuid4().hex[:8].encode())
    return path.read_text()


def cut_back(path: Path, step: int) -> Records:
    """Drop the records after `step` and a last line that a kill cut short; return the others."""
    if not path.exists():
        return []
    kept: list[bytes] = []
    records: list[dict[str, Any]] = []
    for line in path.read_bytes().splitlines(keepends=True):
        if not line.endswith(b"\n") or (record := json.loads(line))["step"] > step:
            break
        kept.append(line)
        records.append(record)
    write_atomic(path, b"".join(kept))
    return records
