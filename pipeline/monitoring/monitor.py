"""The log of a run: `metrics.jsonl`, Weights & Biases, and one line on the console."""

import itertools
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field

from pipeline.common.component import Component
from pipeline.common.console import warn
from pipeline.common.errors import DONE, FAILED
from pipeline.common.files import write_atomic
from pipeline.monitoring.memory import memory_line
from pipeline.monitoring.sheets import Sheet, write_sheet
from pipeline.monitoring.wandb_mode import WandbConfig
from pipeline.monitoring.wandb_sink import Records, WandbSink


class MonitorConfig(Component):
    """How often a run reports."""

    log_every_steps: int = Field(default=50, gt=0)  # steps from one line of metrics to the next
    # Rows of the picture at every evaluation: images chosen by a hash, the same in every run on
    # that data. 0: no pictures, and no best and worst images.
    num_images: int = Field(default=8, ge=0)
    # Keys of the images to picture instead, which must be among those that are evaluated.
    pictured: Annotated[tuple[str, ...], Field(max_length=100)] = ()
    # The metric by which the ten best and the ten worst images are shown, by its name; null: the
    # first of evaluation.metrics that ranks images.
    rows_by: str | None = None
    wandb: WandbConfig = WandbConfig()


class Monitor:
    """The log of one run; does nothing on processes other than the main one."""

    def __init__(
        self,
        run_dir: Path,
        config: MonitorConfig,
        *,
        resolved: Mapping[str, Any],
        step: int,
        num_steps: int,
        is_main: bool,
        evaluates: bool = False,
    ) -> None:
        """Open metrics.jsonl and W&B; remove records after `step`, from which the run goes on.

        resolved: the run's config, for W&B. num_steps: length of the run. evaluates: whether `step`
        has an evaluation.
        """
        self._is_main = is_main
        self.exit_code = DONE  # how the run ended, for W&B
        self.past: Records = ()  # the records up to `step`
        self.lacks_evaluation = False  # whether the evaluation of `step` is missing
        if not is_main:
            return
        self._run_dir = run_dir
        self._num_steps = num_steps
        self._last_progress = (step, time.monotonic())
        self._memory_is_printed = False
        (run_dir / "images").mkdir(exist_ok=True)
        # A run that starts again at step 0 evaluates there again.
        self.past = truncate_records(run_dir / "metrics.jsonl", step if step > 0 else -1)
        self._file = (run_dir / "metrics.jsonl").open("ab", buffering=0)
        self._unwritten = b""
        evaluated = any(r["step"] == step and is_evaluation(r) for r in self.past)
        self.lacks_evaluation = evaluates and not evaluated
        self._wandb = WandbSink(run_dir, config.wandb, resolved=resolved, past=self.past)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record values at a step; each call writes one record."""
        if not self._is_main:
            return
        record = {"step": step, "time": round(time.time(), 3), **values}
        # Python's json writes NaN as NaN: a broken number stays visible.
        self._unwritten += json.dumps(record).encode() + b"\n"
        self._write()
        self._wandb.log(record)

    def _write(self) -> None:
        """Append the unwritten records, all or none; after a full disk the next call retries."""
        size = self._file.seek(0, os.SEEK_END)
        try:
            if self._file.write(self._unwritten) == len(self._unwritten):
                self._unwritten = b""
                return
            problem = "only a part was written"
        except OSError as error:
            problem = str(error)
        self._file.truncate(size)
        warn(f"metrics.jsonl could not be written ({problem}); the next record tries again")

    def show(self, step: int, name: str, sheet: Sheet) -> None:
        """Save what an evaluation shows in images/, and its pictures in W&B; see `sheets`."""
        if not self._is_main:
            return
        for path in write_sheet(self._run_dir / "images", step, name, sheet):
            if path.suffix == ".png":  # W&B reads it again at the next start
                picture = f"images/{path.stem.rpartition('-')[0]}"
                self._wandb.log({"step": step, "time": time.time(), picture: path})

    def progress(self, step: int, values: Mapping[str, float]) -> None:
        """Print the console's line of a log; after the first also the peak of memory."""
        if not self._is_main:
            return
        former_step, former_time = self._last_progress
        now = time.monotonic()
        self._last_progress = (step, now)
        seconds_per_step = (now - former_time) / max(step - former_step, 1)
        minutes, seconds = divmod(int((self._num_steps - step) * seconds_per_step), 60)
        self.print_line(
            f"step {step:,}/{self._num_steps:,}  loss {values['train/loss']:.4g}  "
            f"{values['perf/images_per_second']:,.0f} images/s  "
            f"waiting for data {values['perf/data_wait_fraction']:.0%}  "
            f"{minutes}:{seconds:02d} left"
        )
        if not self._memory_is_printed and (line := memory_line(values)):
            self.print_line(line)
        self._memory_is_printed = True

    def print_line(self, text: str) -> None:
        """Print a line on the console."""
        if self._is_main:
            print(text, file=sys.stderr, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Close metrics.jsonl and W&B, which shows a run that ends by an exception as failed."""
        if not self._is_main:
            return
        self._file.close()
        self._wandb.close(self.exit_code if kind is None else FAILED)


def is_evaluation(record: Mapping[str, Any]) -> bool:
    """Whether a record of metrics.jsonl is that of an evaluation, of whichever data."""
    return any(name.startswith("eval/") for name in record)


def read_records(path: Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl, without an incomplete last line: it may be in the middle of a write."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    whole = itertools.takewhile(lambda line: line.endswith(b"\n"), lines)
    return [json.loads(line) for line in whole]


def truncate_records(path: Path, step: int) -> Records:
    """Remove the records after `step` and an incomplete last line; return the others."""
    if not path.exists():
        return []
    records = list(itertools.takewhile(lambda r: r["step"] <= step, read_records(path)))
    kept = path.read_bytes().splitlines(keepends=True)[: len(records)]
    write_atomic(path, b"".join(kept))
    return records
