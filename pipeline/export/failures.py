"""Attempts that failed by the task's own fault, and when that is enough: `_run/failures/`.

    a verdict on the data (RejectedError: too many bad rows)                 -> at once
    an unexpected error of the code                                           -> MAX_ATTEMPTS
    the disk, the network, memory, the device (run.is_infrastructure)         -> never counted

A task that had enough is in quarantine: workers pass it over until `--retry-failed`. Attempts of
all processes and starts count; those of killed processes do not, as nobody wrote them down.
"""

import errno
import json
import os
import socket
import traceback
from collections import defaultdict
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import Literal

from pipeline.common.errors import UserError
from pipeline.data.storage.threads import map_in_threads
from pipeline.export.layout import FAILURES, ExportDir, flat_name, new_id

Kind = Literal["verdict", "attempt"]
MAX_ATTEMPTS = 3  # that a task may fail by unexpected errors, over all processes and starts
READERS = 16
# What keeps everybody from writing, until a person does something.
UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}


class RejectedError(UserError):
    """The rows of a task cannot be exported with these settings; another try would say the same."""


def is_unwritable(error: BaseException) -> bool:
    """Tell whether an error is a full or protected disk."""
    return isinstance(error, OSError) and error.errno in UNWRITABLE


def record_failure(export: ExportDir, task: str, error: Exception) -> None:
    """Write down that an attempt at a task failed by its own fault."""
    kind: Kind = "verdict" if isinstance(error, RejectedError) else "attempt"
    record = {
        "task": task,
        "kind": kind,
        "reason": f"{error}" if kind == "verdict" else f"{type(error).__name__}: {error}",
        "traceback": "".join(traceback.format_exception(error)),
        "host": socket.gethostname(),
        "pid": os.getpid(),
    }
    name = f"{FAILURES}/{flat_name(task)}.{kind}.{new_id()}.json"
    export.store.put(name, json.dumps(record, indent=1).encode())


def failed_tasks(export: ExportDir, tasks: Iterable[str]) -> dict[str, list[str]]:
    """Return task -> names of its failures, for those of the tasks that had enough; one listing."""
    found: dict[str, list[str]] = defaultdict(list)
    for name in export.store.sizes(FAILURES):
        found[PurePosixPath(name).name.rsplit(".", 3)[0]].append(name)
    return {
        task: names
        for task in tasks
        if (names := found.get(flat_name(task), []))
        and (len(names) >= MAX_ATTEMPTS or any(".verdict." in name for name in names))
    }


def reason_of(export: ExportDir, name: str) -> str:
    """Return, in one line or paragraph, what a failure's record says."""
    data = export.store.read(name)
    return "its record is gone" if data is None else str(json.loads(data)["reason"])


def clear_failures(export: ExportDir) -> int:
    """Let all tasks out of quarantine; return how many attempts are forgotten."""
    names = list(export.store.sizes(FAILURES))
    map_in_threads(export.store.delete, names, READERS)
    return len(names)
