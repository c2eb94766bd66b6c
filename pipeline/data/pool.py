"""Worker processes for pack and index: started afresh, and gone when their parent is."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Generator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager


def _begin() -> None:
    """Leave Ctrl-C to the parent, which ends us; end when it was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)  # nobody is left who could read a result


@contextmanager
def worker_processes(count: int) -> Generator[ProcessPoolExecutor]:
    """Start `count` processes, not by forking: a fork would copy the locks of our threads.

    On an error the work that has not begun is dropped, and what has begun is finished. Ctrl-C ends
    that, too: a worker may be ended at any instruction, as everything that it writes appears whole.
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
