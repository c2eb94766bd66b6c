"""`accelerate launch` without a traceback of its own, and with the exit code of what it started.

`launch.local` runs this file: the failed process has printed its error already.
"""

import sys
from subprocess import CalledProcessError

from accelerate.commands.launch import main
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

if __name__ == "__main__":
    try:
        main()
    except CalledProcessError as error:  # of one process
        sys.exit(max(error.returncode, 1))  # below 0: killed by a signal
    except ChildFailedError as error:  # of several; after the first failure the others are killed
        sys.exit(max(error.get_first_failure()[1].exitcode, 1))
