"""Samples that could not be used: listed once each in `<run>/quarantine.jsonl`, counted, limited.

Such a sample keeps its slot with weight 0 (a tombstone), so nothing else moves.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from pipeline.data.stream import Stream
from pipeline.errors import UserError
from pipeline.runtime import Runtime

# A fraction of fewer samples than this says nothing.
MIN_SAMPLES_JUDGED = 1000


class Quarantine:
    """The list of one run directory, kept by the main process."""

    def __init__(self, run_dir: Path, max_bad_fraction: float, runtime: Runtime) -> None:
        self._path = run_dir / "quarantine.jsonl"
        self._max_bad_fraction = max_bad_fraction
        self._runtime = runtime
        self._known: set[int] = set()
        if runtime.is_main and self._path.exists():
            lines = self._path.read_bytes().splitlines(keepends=True)
            whole = [line for line in lines if line.endswith(b"\n")]
            self._known = {json.loads(line)["uid"] for line in whole}

    def collect(self, stream: Stream, values: Mapping[str, float]) -> None:
        """Take new entries from every process's stream; a collective.

        values: what `TrainingMeter.read` returned, the same on every process. Raises UserError if
        too large a fraction of the samples since this start could not be used.
        """
        num_tombstones, num_images = values["data/tombstones"], values["data/images"]
        if not num_tombstones:
            return
        found = self._runtime.gather(stream.take_quarantined())
        new = {entry.uid: entry for entries in found for entry in entries}
        new = {uid: entry for uid, entry in new.items() if uid not in self._known}
        if self._runtime.is_main and new:
            self._known |= new.keys()
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(asdict(entry)) + "\n" for entry in new.values())
                file.flush()
                os.fsync(file.fileno())
        bad = num_tombstones / max(num_images, MIN_SAMPLES_JUDGED)
        if bad > self._max_bad_fraction:
            raise UserError(
                f"{num_tombstones:.0f} of {num_images:.0f} samples could not be used: more than "
                f"data.max_bad_fraction {self._max_bad_fraction:g}. They are listed with their "
                "reasons in "
                f"{self._path}."
            )
