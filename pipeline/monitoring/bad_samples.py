"""Bad samples of a training: listed once each in `<run>/quarantine.jsonl`, counted, limited.

A sample that cannot be used keeps its slot, with weight 0 (a tombstone): no other sample moves.
"""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from pipeline.common.console import plural, progress, warn
from pipeline.common.errors import UserError
from pipeline.data.settings import MIN_SAMPLES_JUDGED, DataConfig
from pipeline.data.stream import Quarantined, Stream
from pipeline.distributed.runtime import Runtime


class Quarantine:
    """The list of one run's bad samples, written by the main process."""

    def __init__(self, run_dir: Path | None, data: DataConfig, runtime: Runtime) -> None:
        """run_dir: None: they are not of a run's data, and are printed instead."""
        self._path = None if run_dir is None else run_dir / "quarantine.jsonl"
        self._max_bad_fraction = data.max_bad_fraction
        self._max_bad_in_row = data.max_bad_in_row
        self._runtime = runtime
        self._known: set[int] = set()
        self._may_end_amid_a_line = True  # a kill leaves that
        if runtime.is_main and self._path is not None and self._path.exists():
            whole, _ = self._whole_lines(self._path)
            self._known = {json.loads(line)["uid"] for line in whole.splitlines()}
        self._num_told = len(self._known)

    @property
    def _where(self) -> str:
        return "above" if self._path is None else f"in {self._path}"

    @staticmethod
    def _whole_lines(path: Path) -> tuple[bytes, bytes]:
        """Return the file's whole lines, and what follows them."""
        content = path.read_bytes()
        end = content.rfind(b"\n") + 1
        return content[:end], content[end:]

    def collect(self, stream: Stream) -> dict[str, float]:
        """Write new entries of every process's stream and return counts to log; a collective.

        Raises UserError, on every process, if too many samples of the stream were bad.
        """
        counters = stream.counters
        mine = (stream.take_quarantined(), counters.tombstones, counters.images)
        mine += (counters.max_bad_in_row,)
        entries, tombstones, images, in_row = zip(*self._runtime.gather(mine), strict=True)
        num_tombstones, num_images = sum(tombstones), sum(images)
        self._record(entry for part in entries for entry in part)
        if num_tombstones > self._max_bad_fraction * max(num_images, MIN_SAMPLES_JUDGED):
            raise UserError(
                f"{num_tombstones} of {num_images} samples could not be used: more than "
                f"data.max_bad_fraction {self._max_bad_fraction:g} allows. They are listed with "
                f"their reasons {self._where}."
            )
        if max(in_row) > self._max_bad_in_row:
            raise UserError(
                f"{max(in_row)} samples in a row could not be used: more than data.max_bad_in_row "
                f"{self._max_bad_in_row} allows. They are listed with their reasons {self._where}."
            )
        return {"data/tombstones": num_tombstones, "data/images": num_images}

    def _record(self, entries: Iterable[Quarantined]) -> None:
        new = {entry.uid: entry for entry in entries if entry.uid not in self._known}
        if not self._runtime.is_main or not new:
            return
        self._known |= new.keys()
        lines = [json.dumps(entry._asdict()) + "\n" for entry in new.values()]
        if self._path is None:
            self._print(f"{plural(len(new), 'sample')} could not be used", lines)
            return
        if len(self._known) >= 2 * self._num_told:
            self._num_told = len(self._known)
            progress(f"{plural(self._num_told, 'sample')} could not be used: see {self._path}")
        try:
            self._append(self._path, lines)
        except OSError as error:  # as for a run that may be read only, and is evaluated
            told = f"{self._path} cannot be written to ({error.strerror})"
            self._print(f"{told}, so bad samples stand here", lines)

    def _append(self, path: Path, lines: Sequence[str]) -> None:
        if self._may_end_amid_a_line and path.exists():
            whole, rest = self._whole_lines(path)  # now: training and evaluation may write in turn
            if rest:
                os.truncate(path, len(whole))
        self._may_end_amid_a_line = False
        with path.open("a", encoding="utf-8") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())

    @staticmethod
    def _print(told: str, lines: Sequence[str]) -> None:
        warn("\n".join([f"{told}:", *map(str.rstrip, lines)]))
