"""Worker processes for pack and index: spawned, not forked; they end with their parent."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Generator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager


def _begin() -> None:
    """Ignore Ctrl-C, which the parent handles; end this process if the parent is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)  # no process is left to read a result


@contextmanager
def worker_processes(count: int) -> Generator[ProcessPoolExecutor]:
    """Spawn `count` processes: a fork would copy locks that other threads hold.

    After an error, pending work is cancelled and running work is finished. Ctrl-C also terminates
    running work: that is safe at any instruction, because every file is published whole.
    """
    others = set(multiprocessing.active_children())
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(count, mp_context=context, initializer=_begin)
    try:
        yield pool
    except KeyboardInterrupt:
        for worker in set(multiprocessing.active_children()) - others:
            worker.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
