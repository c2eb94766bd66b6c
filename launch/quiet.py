"""`accelerate launch` without a traceback of its own where one of its processes ended badly.

`launch.local` runs this file: the run itself has said why it ended, and the launcher's exit code is
all that it adds.
"""

import sys
from subprocess import CalledProcessError

from accelerate.commands.launch import main
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

if __name__ == "__main__":
    try:
        main()
    except (CalledProcessError, ChildFailedError):
        sys.exit(1)
