"""Two hosts on this machine: network namespaces of their own, joined by one cable (a veth pair).

Each has its address, its loopback and nothing else; files and process numbers are shared. Needs
root and Debian's iproute2; what the machine's own network holds is not touched.
"""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from tests.processes import ROOT

PORT = 29500  # free in a new network namespace
CARD = "mill0"  # on both hosts


def missing() -> str | None:
    """Why this machine cannot have network namespaces, if so."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "not installed: ip; apt-get install iproute2"
    name = f"mill-{os.getpid()}-probe"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode != 0:
        return f"`ip netns add` is not allowed here: {made.stderr.strip()}"
    ip("netns", "delete", name)
    return None


def ip(*words: str) -> str:
    """What `ip` prints; fails with its complaint."""
    ended = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, f"ip {' '.join(words)}: {ended.stderr}"
    return ended.stdout


def documented(topology: Path) -> list[str]:
    """Arguments of the `accelerate launch` for several machines that a topology file opens with."""
    lines = topology.read_text().splitlines()
    comments = [line.removeprefix("#").strip() for line in lines if line.startswith("#")]
    commands = "\n".join(comments).replace("\\\n", " ").splitlines()
    [command] = [c for c in commands if c.startswith("accelerate launch") and "--num_machines" in c]
    program, *arguments, rest = shlex.split(command)
    assert (program, rest) == ("accelerate", "...")
    return arguments


class Hosts:
    """Starts on construction, connected; `close` ends all that runs on them, and removes them."""

    def __init__(self) -> None:
        self.names = [f"mill-{os.getpid()}-{host}" for host in (0, 1)]
        self.addresses = ["10.77.0.1", "10.77.0.2"]
        try:
            for name in self.names:
                ip("netns", "add", name)
            here, there = self.names
            cable = ("link", "add", CARD, "netns", here, "type", "veth")
            ip(*cable, "peer", "name", CARD, "netns", there)
            for name, address in zip(self.names, self.addresses, strict=True):
                ip("-n", name, "address", "add", f"{address}/24", "dev", CARD)
                ip("-n", name, "link", "set", "lo", "up")
            self.connect(True)
        except BaseException:
            self.close()
            raise

    def connect(self, up: bool) -> None:
        """Plug the cable in, or pull it out: packets are lost without an error."""
        for name in self.names:
            ip("-n", name, "link", "set", CARD, "up" if up else "down")

    def env(self) -> dict[str, str]:
        """Environment of processes on these hosts, whose names have no address."""
        return {"GLOO_SOCKET_IFNAME": CARD}

    def argv(self, host: int, topology: str, *arguments: object) -> list[str]:
        """Training on `host` by the command that a topology file documents for several machines."""
        words = documented(ROOT / "configs" / "accelerate" / topology)
        values = {
            "RANK_OF_THIS_MACHINE": str(host),
            "ADDRESS_OF_MACHINE_0": self.addresses[0],
            "16": "2",  # processes: one on each host
            "29500": str(PORT),
        }
        words = [values.get(word, word) for word in words]
        accelerate = str(Path(sys.executable).with_name("accelerate"))
        on_host = ["ip", "netns", "exec", self.names[host]]
        return [*on_host, accelerate, *words, *map(str, arguments)]

    def running(self) -> list[psutil.Process]:
        """All processes that still run on the hosts, also orphans."""
        found: list[psutil.Process] = []
        for name in self.names:
            for pid in map(int, ip("netns", "pids", name).split()):
                try:
                    found.append(psutil.Process(pid))
                except psutil.NoSuchProcess:  # it has ended since
                    continue
        return found

    def close(self) -> None:
        """Kill what runs on the hosts, and remove them with their cable."""
        existing = ip("netns", "list").split()
        limit = time.monotonic() + 10
        while self.names[1] in existing and (left := self.running()) and time.monotonic() < limit:
            for process in left:
                try:
                    process.send_signal(signal.SIGKILL)
                except psutil.NoSuchProcess:
                    continue
            psutil.wait_procs(left, timeout=1)
        for name in set(self.names) & set(existing):
            ip("netns", "delete", name)
