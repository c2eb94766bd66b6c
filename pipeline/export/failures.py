"""Records of failed attempts in `_run/failures/`, and when a task counts as failed.

    the data are rejected (RejectedError: too many bad rows)             -> after one attempt
    an unexpected error of the code                                      -> after MAX_ATTEMPTS
    the disk, the network, memory, the device (run.is_infrastructure)    -> never

Workers skip a failed task until `--retry-failed`. Attempts of all processes and starts count, but
not those of killed processes, which leave no record.
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
MAX_ATTEMPTS = 3  # with unexpected errors, over all processes and starts
READERS = 16
# Errors that keep all processes from writing until the user acts.
UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}


class RejectedError(UserError):
    """The rows of a task cannot be exported with these settings; a retry would fail again."""


def is_unwritable(error: BaseException) -> bool:
    """Return whether an error says that the disk is full or protected."""
    return isinstance(error, OSError) and error.errno in UNWRITABLE


def record_failure(export: ExportDir, task: str, error: Exception) -> None:
    """Record an attempt that failed because of the task itself."""
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
    """Return failed task -> names of its records, of the given tasks; by one listing."""
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
    """Return the reason in a failure's record."""
    data = export.store.read(name)
    return "its record is gone" if data is None else str(json.loads(data)["reason"])


def clear_failures(export: ExportDir) -> int:
    """Remove all records of failures, so that the tasks are tried again; return their number."""
    names = list(export.store.sizes(FAILURES))
    map_in_threads(export.store.delete, names, READERS)
    return len(names)
