"""How the processes of a run end: with the message of one of them, and with their exit codes."""

import atexit
import os
import sys
import time
from collections.abc import Mapping
from typing import NoReturn

from pipeline.common.errors import DONE

SPEAKER_FIRST_SECONDS = 10.0


def let_speaker_end_first(environment: Mapping[str, str]) -> None:
    """Wait 10 s for the process that prints the error which this one has, too.

    Under torchrun, also by `accelerate launch`, the first process that ends takes the others with
    it, by SIGTERM: so the message is printed, and once.
    """
    if "TORCHELASTIC_RUN_ID" in environment:
        time.sleep(SPEAKER_FIRST_SECONDS)


def leave(code: int) -> NoReturn:
    """End this process with an exit code, also while threads of a process group run.

    torch aborts (SIGABRT, so that the exit code is lost) if the interpreter is taken down under
    threads of gloo (pytorch issue 190489). So a process that is done leaves its group first. After
    an error that could wait for others that do not come: the exit functions run, the output is
    flushed, and nothing is taken down.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_initialized():
        sys.exit(code)
    if code == DONE:
        distributed.destroy_process_group()
        sys.exit(code)
    atexit._run_exitfuncs()  # pyright: ignore[reportPrivateUsage]
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
