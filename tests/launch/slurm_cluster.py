"""A real Slurm on this machine: munged, one slurmctld, and two slurmd that call themselves n1, n2.

Debian: apt-get install slurm-wlm munge. Everything lives in one short-lived directory, listens on
free ports, and ends with it; a Slurm that the machine runs itself is not touched.
"""

import getpass
import os
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.launch.runs import free_ports

NODES = ("n1", "n2")
DAEMONS = ("munged", "slurmctld", "slurmd")
SBIN = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])

# cred_expire: a job that is queued again waits so many seconds before it may start.
CONF = """\
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,bf_interval=2
ReturnToService=2
KillWait=20
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1
PartitionName=two Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> list[str]:
    """The programs of Slurm and munge that are not installed here."""
    wanted = (*DAEMONS, "sbatch", "srun", "scontrol", "squeue", "scancel")
    return [name for name in wanted if shutil.which(name, path=SBIN) is None]


class SlurmCluster:
    """Starts on construction, with two idle nodes; `close` ends all jobs and daemons."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: it holds a Unix socket
        self.env = {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": SBIN}
        self._daemons: list[subprocess.Popen[bytes]] = []
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        key, conf = self.folder / "munge.key", self.folder / "slurm.conf"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(256))
        for name in ("state", *(f"spool-{node}" for node in NODES)):
            (self.folder / name).mkdir()
        conf.write_text(
            CONF.format(folder=self.folder, user=getpass.getuser(), ports=free_ports(3))
        )
        at = self.folder
        places = {"key-file": key, "socket": at / "munge.socket", "pid-file": at / "munged.pid"}
        places |= {"seed-file": at / "munged.seed", "log-file": at / "munged.log"}
        options = [f"--{name}={place}" for name, place in places.items()]
        self._daemon("munged", "--foreground", "--force", *options)
        self.wait_until((self.folder / "munge.socket").exists, 20)
        self._daemon("slurmctld", "-D")
        for node in NODES:
            self._daemon("slurmd", "-D", "-N", node)
        self.wait_until(lambda: self.ask("sinfo", "-h", "-o", "%T %D") == "idle 2", 60)

    def _daemon(self, *argv: str) -> None:
        log = (self.folder / f"{argv[0]}-{len(self._daemons)}.out").open("wb")
        program = shutil.which(argv[0], path=SBIN)
        assert program is not None
        with log:
            process = subprocess.Popen(
                [program, *argv[1:]],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | self.env,
                cwd=self.folder,
            )
        self._daemons.append(process)

    def ask(self, *argv: str) -> str:
        """What a command of Slurm prints; empty if it fails."""
        ended = subprocess.run(
            argv, env=os.environ | self.env, capture_output=True, text=True, check=False
        )
        return ended.stdout.strip()

    def job(self, number: int | str) -> dict[str, str]:
        """What Slurm knows of a job, or of an element as "7_0": JobState, Restarts, ExitCode ..."""
        words = self.ask("scontrol", "--oneliner", "show", "job", str(number)).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def state(self, number: int) -> str:
        """RUNNING, PENDING, COMPLETED, FAILED, CANCELLED ...; of an array: of its elements."""
        states = self.ask("squeue", "-h", "-t", "all", "-r", "-o", "%T", "-j", str(number))
        return " ".join(sorted(set(states.split())))

    def wait_until(self, holds: Callable[[], bool], seconds: float) -> None:
        """Wait for a condition; fails with the daemons' last words if it does not come to hold."""
        limit = time.monotonic() + seconds
        while not holds():
            if time.monotonic() > limit:
                logs = "\n".join(
                    f"--- {path.name}\n{path.read_text(errors='replace')[-1500:]}"
                    for path in sorted([*self.folder.glob("*.log"), *self.folder.glob("*.out")])
                )
                raise AssertionError(
                    f"not after {seconds} s; squeue:\n{self.ask('squeue')}\n{logs}"
                )
            time.sleep(0.2)

    def close(self) -> None:
        """End all jobs, then the daemons, and remove their directory."""
        if len(self._daemons) == 2 + len(NODES):
            self.ask("scancel", f"--user={getpass.getuser()}")
            limit = time.monotonic() + 30
            while self.ask("squeue", "-h") and time.monotonic() < limit:
                time.sleep(0.2)
        for process in reversed(self._daemons):
            process.terminate()
        for process in self._daemons:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(self.folder)
