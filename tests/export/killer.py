"""Start an export, SIGKILL some or all of its processes, start it with another number; repeat.

`python killer.py CONFIG OUT SEED KILLS`; exports go to OUT/0, OUT/1 ... (a directory or s3:// URL).
Everything is imported once and each process is a fork, so a start costs milliseconds and a kill may
fall into any instruction of the protocol, not mostly into the imports. A kill comes at a random
moment after a random number of commits, so that it meets work in every phase; an uninterrupted
export says how long such moments are. Three kinds of starts take turns:

    all      all processes at once
    one      one of several; the others go on, to their end or until they are killed, too
    beside   two exports of different size at once on the same directory, one or both killed

Prints {"places": the exports, each finished by a last start that nobody disturbed, "starts":
[{"kind", "sizes", "codes": exit codes of each size's processes, "phases": in which a kill hit}]}.
Stores are opened in the forks only: an s3fs that was used does not survive a fork.
"""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, cycle
from pathlib import Path
from typing import Any

import boto3

from pipeline.export.__main__ import main

SIZES = (1, 2, 3, 5)
KINDS = ("all", "one", "beside")
STARTS_PER_PLACE = 6
KILLED = -signal.SIGKILL
COMMITS = "_run/commits"


def start(config: str, place: str, world: int) -> list[int]:
    """Fork the workers of one export and return their process ids."""
    return [_fork(config, place, f"{rank}/{world}") for rank in range(world)]


def _fork(config: str, place: str, worker: str) -> int:
    pid = os.fork()
    if pid == 0:
        log = os.open(f"{config}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 2)
        os._exit(main([config, f"out={place}", "--worker", worker]))
    return pid


def is_running(pid: int) -> bool:
    """Return whether a child process, not yet waited for, is alive."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def files_of(place: str, folder: str = "") -> Iterator[str]:
    """Yield the names of an export's files below a folder."""
    if not place.startswith("s3://"):
        for path, _, names in os.walk(Path(place, folder)):
            yield from (Path(path, name).relative_to(place).as_posix() for name in names)
        return
    bucket, prefix = place.removeprefix("s3://").split("/", 1)
    pages = boto3.client("s3").get_paginator("list_objects_v2")
    for page in pages.paginate(Bucket=bucket, Prefix=f"{prefix}/{folder}"):
        yield from (item["Key"][len(prefix) + 1 :] for item in page.get("Contents", []))


def num_commits(place: str) -> int:
    """Count the commit records; temporary files are none."""
    return sum(name.endswith(".json") for name in files_of(place, COMMITS))


@dataclass(frozen=True)
class Alone:
    """An export that nothing interrupted."""

    seconds: float
    commits: int
    files: int  # below data/

    def phase(self, place: str) -> str:
        """Return the progress of another export."""
        names = list(files_of(place))
        commits = sum(name.startswith(COMMITS) and name.endswith(".json") for name in names)
        files = sum(name.startswith("data/") for name in names)
        if "_SUCCESS" in names:
            return "after"
        if commits in (0, self.commits):
            return "finalize" if commits else "before"
        is_published = files * self.commits >= commits * self.files
        return "between" if is_published else "publish"


def run_alone(config: str, place: str) -> Alone:
    """Time an export by one worker."""
    started = time.monotonic()
    assert wait_for(start(config, place, 1)) == [0]
    seconds = time.monotonic() - started
    files = len(list(files_of(place, "data")))
    return Alone(seconds, num_commits(place), files)


def wait_for(pids: Sequence[int]) -> list[int]:
    """Return the exit codes."""
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


@dataclass
class Killer:
    config: str
    alone: Alone
    chance: random.Random
    world: int = 0  # size of the last start
    kills: int = 0  # that hit somebody
    starts: list[dict[str, Any]] = field(default_factory=list)

    def other_world(self, smallest: int = 1) -> int:
        """Choose a size that is not the last one's."""
        sizes = [size for size in SIZES if size != self.world and size >= smallest]
        self.world = self.chance.choice(sizes)
        return self.world

    def strike(self, place: str, kind: str) -> None:
        """Start, kill, wait for what is left."""
        sizes = [self.other_world(2 if kind == "one" else 1)]
        if kind == "beside":
            sizes.append(self.other_world())
        exports = [start(self.config, place, world) for world in sizes]
        everybody = [pid for pids in exports for pid in pids]
        choices = {"all": [everybody], "one": [[pid] for pid in everybody]}
        victims = self.chance.choice(choices.get(kind, [*exports, everybody]))
        strikes = [(victims, self.kill(place, victims, everybody))]
        others = [pid for pid in everybody if pid not in victims]
        if others and self.chance.random() < 0.5:
            strikes.append((others, self.kill(place, others, others)))
        codes = dict(zip(everybody, wait_for(everybody), strict=True))
        phases = [phase for pids, phase in strikes if any(codes[pid] == KILLED for pid in pids)]
        self.kills += len(phases)
        all_codes = [[codes[pid] for pid in pids] for pids in exports]
        self.starts.append({"kind": kind, "sizes": sizes, "codes": all_codes, "phases": phases})

    def kill(self, place: str, victims: Sequence[int], running: Sequence[int]) -> str:
        """SIGKILL the victims some commits from now and a moment later; return the phase."""
        before, total = num_commits(place), self.alone.commits
        goal = min(total, before + self.chance.choice([0, 0, 0, 1, 2, 4, total]))
        while num_commits(place) < goal and any(map(is_running, running)):
            time.sleep(0.001)
        # From nothing to the first commit, from one to the next, and from the last to the end.
        share = 1 / 2 if goal == before else 1 / 8 if goal == total else 1 / total
        time.sleep(self.chance.uniform(0, share * self.alone.seconds))
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        return self.alone.phase(place)

    def finish(self, place: str) -> None:
        """Start once more, undisturbed."""
        world = self.other_world()
        codes = wait_for(start(self.config, place, world))
        self.starts.append({"kind": "last", "sizes": [world], "codes": [codes], "phases": []})


def kill_and_restart(config: str, out: str, seed: int, kills: int) -> dict[str, Any]:
    """Continue until one or more processes were killed `kills` times."""
    killer = Killer(config, run_alone(config, f"{out}/alone"), random.Random(seed))
    places, kinds = [f"{out}/alone"], cycle(KINDS)
    for number in count():
        place = f"{out}/{number}"
        places.append(place)
        for _ in range(STARTS_PER_PLACE):
            killer.strike(place, next(kinds))
            if killer.kills >= kills or "_SUCCESS" in files_of(place):
                break
        killer.finish(place)
        if killer.kills >= kills:
            return {"places": places, "starts": killer.starts}
    raise AssertionError


if __name__ == "__main__":
    path, where, number, wanted = sys.argv[1:]
    print(json.dumps(kill_and_restart(path, where, int(number), int(wanted))))
