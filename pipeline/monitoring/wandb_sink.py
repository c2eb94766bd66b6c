"""Weights & Biases: a thread of the main process, for which the training never waits.

    metrics.jsonl and images/, from before this start -> thread -> run of W&B
    `log`, from now on                       -> queue -> thread -> run of W&B

Offline, every start writes the whole run as one piece, `offline-run-*`. The former then moves to
`former/`, so that `wandb sync` sends the run once. Online, the server says how many steps it has,
and gets the others. So the next start sends whatever W&B missed: by a kill, a failure, a broken
network. W&B's first failure is printed and turns it off; the training goes on.
"""

import math
import os
import re
import shlex
import shutil
import time
import uuid
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any

from pipeline.common.console import progress, warn
from pipeline.common.errors import DONE, FAILED, PREEMPTED
from pipeline.common.files import write_atomic
from pipeline.monitoring.wandb_mode import WandbConfig, choose, in_words, off_by, root_of

INIT_SECONDS = 10.0  # for the server to take a run, unless WANDB_INIT_TIMEOUT is set
FINISH_SECONDS = 10.0  # for W&B's upload at the end; `wandb sync` sends the rest
BACKLOG_SECONDS = 600.0  # for records that are not yet sent to W&B when a run is done
# Pause after each former record, as a multiple of the time that it took: the thread shares the
# interpreter with the training.
PAUSE = 3.0
HIDDEN = ("data/order_digest", "data/ledger/*")  # their charts would show noise
# Of these the smallest value is kept as best/NAME. W&B's own minima would take the place of the
# last value, which sweeps read.
SMALLEST = re.compile(r"eval\w*/(\w+/)?(loss|squared_error|nats|bits_per_dimension)")

Record = Mapping[str, Any]  # of metrics.jsonl: step, time, values by name; here also pictures
Records = Sequence[Record]


class WandbSink:
    """Sends values and pictures to Weights & Biases, until its first failure."""

    def __init__(
        self, run_dir: Path, config: WandbConfig, *, resolved: Mapping[str, Any], past: Records
    ) -> None:
        """Open a W&B run that has the records `past` and those to come."""
        self._run_dir = run_dir
        self._config = config
        self._queue: SimpleQueue[Record | None] = SimpleQueue()
        self._is_over = Event()  # the training
        self._exit_code = DONE
        self._thread: Thread | None = None
        self._run: Any = None
        self._pending: dict[str, Any] = {}  # of one step
        self._best: dict[str, float] = {}
        if off := off_by(config):
            progress(f"wandb: off ({off})")
            return
        # Not imported by the thread: two threads that import may see half a package.
        self._wandb: Any = import_module("wandb")
        self._thread = Thread(target=self._work, args=(resolved, past), daemon=True)
        self._thread.start()

    def log(self, record: Record) -> None:
        """Send a record; a value that is a path is a picture. Those of one step go together."""
        if self._thread is not None and self._thread.is_alive():
            self._queue.put(record)

    def close(self, exit_code: int) -> None:
        """Send what is not yet sent and finish the W&B run, within a bounded time."""
        if self._thread is None:
            return
        self._exit_code = exit_code
        self._is_over.set()
        self._queue.put(None)
        limit = FINISH_SECONDS + (BACKLOG_SECONDS if exit_code == DONE else FINISH_SECONDS)
        self._thread.join(limit)
        if self._thread.is_alive():
            warn(f"W&B is not done after {limit:.0f} s; the next start sends what it lacks")

    def _work(self, resolved: Mapping[str, Any], past: Records) -> None:
        """Do all that W&B is asked for; runs in the thread."""
        try:
            if (line := self._open(resolved)) is None:
                return
            self._catch_up(past)
            self._set_former_aside()
            while (record := self._queue.get()) is not None:
                self._add(record)
            self._send()
            if self._exit_code == PREEMPTED:
                self._run.mark_preempting()  # so that a sweep starts this trial again
            try:
                self._run.finish(exit_code=self._exit_code)
            except TimeoutError:
                warn(
                    f"W&B's server did not take all of it within {FINISH_SECONDS:.0f} s: "
                    f"`{self._sync}` uploads the rest, and so does the next start"
                )
            progress(line)
        except Exception as error:  # noqa: BLE001 - reported; W&B is turned off
            # Whatever the error is, the training goes on without W&B.
            warn(
                f"W&B failed and is off for the rest of this run ({type(error).__name__}: "
                f"{in_words(error)}); metrics.jsonl goes on, and the next start sends all of it"
            )
            # Otherwise wandb would print its errors at exit.
            with suppress(Exception):
                self._wandb.teardown(exit_code=FAILED)

    @property
    def _piece(self) -> Path:
        """The folder of this start's run."""
        return Path(self._run.dir).parent

    @property
    def _sync(self) -> str:
        """The command that uploads it."""
        return shlex.join(["wandb", "sync", f"{self._piece}"])

    def _open(self, resolved: Mapping[str, Any]) -> str | None:
        """Start the run, offline if it must be; print and return the line that says where it is."""
        mode, reason, is_problem = choose(self._config)
        if mode == "disabled":
            (warn if is_problem else progress)(f"wandb: off ({reason})")
            return None
        settings, id_file = self._wandb.setup().settings, self._run_dir / "wandb" / "run-id"
        arguments: dict[str, Any] = {
            "name": self._config.name or settings.run_name or self._run_dir.resolve().name,
            "group": self._config.group,
            "tags": self._config.tags,
            "dir": root_of(self._run_dir).parent,
            "config": dict(resolved),
        }
        kept = id_file.read_text() if id_file.exists() else uuid.uuid4().hex[:12]
        run_id = os.environ.get("WANDB_RUN_ID") or kept
        # Before the server hears of it: a start that is killed meanwhile leaves no second run.
        id_file.parent.mkdir(exist_ok=True)
        write_atomic(id_file, run_id.encode())
        if not os.environ.get("WANDB_SWEEP_ID"):  # in a sweep W&B takes the agent's alone
            arguments["id"] = run_id
            arguments["project"] = self._config.project or settings.project or "latentmill"
        if mode != "offline":
            try:
                self._init(mode, resume=os.environ.get("WANDB_RESUME", "allow"), **arguments)
            except Exception as error:  # noqa: BLE001 - whatever the server said
                mode, is_problem = "offline", True
                reason = f"{settings.base_url} takes no run: {in_words(error)}"
                self._wandb.teardown(exit_code=FAILED)  # its process still holds the id
        if mode == "offline":
            self._init(mode, **arguments)
            line = f"wandb: offline ({reason}); `{self._sync}` uploads it"
        else:
            line = f"wandb: online {self._run.url}"
        for name in HIDDEN:
            self._run.define_metric(name, hidden=True)
        (warn if is_problem else progress)(line)
        return line

    def _init(self, mode: str, **arguments: Any) -> None:
        settings = {"console": "off", "silent": True, "finish_timeout": FINISH_SECONDS}
        if mode != "offline" and "WANDB_INIT_TIMEOUT" not in os.environ:
            settings["init_timeout"] = INIT_SECONDS
        settings = self._wandb.Settings(**settings, finish_timeout_raises=True)
        self._run = self._wandb.init(mode=mode, settings=settings, **arguments)

    def _catch_up(self, past: Records) -> None:
        """Send the former records that the run lacks, with the pictures of their steps."""
        pictures: dict[int, dict[str, Path]] = defaultdict(dict)
        for path in (self._run_dir / "images").glob("*.png"):
            if found := re.fullmatch(r"(.+)-(\d+)\.png", path.name):
                pictures[int(found[2])][f"images/{found[1]}"] = path
        for record in past:
            started, step = time.monotonic(), record["step"]
            if step < self._run.starting_step:
                self._better(record)
                continue
            self._add({**record, **pictures.pop(step, {})})
            self._is_over.wait(PAUSE * (time.monotonic() - started))

    def _set_former_aside(self) -> None:
        """Move the former piece of this run to `former/`, where `wandb sync` does not look.

        It takes the place of older ones: this start's piece, or the server, has all that they hold.
        """
        root = root_of(self._run_dir)
        is_ours = root == self._run_dir / "wandb"  # else other runs write there, too
        name = "*" if is_ours else f"run-{self._run.id}"

        def pieces(folder: Path) -> set[Path]:
            return {path.parent for path in folder.glob(f"*run-*/{name}.wandb")}

        if former := {piece for piece in pieces(root) if not piece.samefile(self._piece)}:
            for older in pieces(root / "former"):
                shutil.rmtree(older)
            (root / "former").mkdir(exist_ok=True)
            for piece in former:
                piece.rename(root / "former" / piece.name)

    def _add(self, record: Record) -> None:
        """Keep the values until those of another step come."""
        if self._pending.get("step") != record["step"]:
            self._send()
            self._pending = {}
        self._pending |= record

    def _send(self) -> None:
        """Send the values of one step: numbers and pictures."""
        if not self._pending:
            return
        values = {k: v for k, v in self._pending.items() if isinstance(v, int | float)}
        step, values["_timestamp"] = values.pop("step"), values.pop("time")
        for name, path in self._pending.items():
            if isinstance(path, Path) and path.exists():
                values[name] = self._wandb.Image(f"{path}")
        self._run.log(values, step=step)
        if better := self._better(self._pending):
            self._run.summary.update(better)

    def _better(self, record: Record) -> dict[str, float]:
        """Return the values that are the smallest so far, as best/NAME."""
        better = {
            f"best/{name}": value
            for name, value in record.items()
            if SMALLEST.fullmatch(name) and value < self._best.get(f"best/{name}", math.inf)
        }
        self._best |= better
        return better
