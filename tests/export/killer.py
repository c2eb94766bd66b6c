"""Start an export, kill all its processes at a random moment, start it with another number; repeat.

`python killer.py CONFIG SEED KILLS`. Everything is imported once and each process is a fork, so a
start costs milliseconds and a kill may fall into any instruction of the protocol, not mostly into
the imports. An uninterrupted export to another place is timed first: the delays of all kills
together are less than that, so that they meet work. Prints one JSON line: for each start its number
of processes, the delay of the kill in seconds (null: ran to its end), and the exit codes.
"""

import json
import os
import random
import signal
import sys
import time

from pipeline.export.__main__ import main


def start(config: str, rank: int, world: int, *overrides: str) -> int:
    """Fork one worker and return its process id."""
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # progress
        os._exit(main([config, *overrides, "--worker", f"{rank}/{world}"]))
    return pid


def run(config: str, world: int, delay: float | None) -> list[int]:
    """Run `world` workers; SIGKILL all of them after `delay` seconds. Return their exit codes."""
    pids = [start(config, rank, world) for rank in range(world)]
    if delay is not None:
        time.sleep(delay)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def seconds_alone(config: str) -> float:
    """Time an export by one worker."""
    started = time.monotonic()
    pid = start(config, 0, 1, f"out={config}.timed")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    return time.monotonic() - started


def kill_and_restart(config: str, seed: int, kills: int) -> list[dict]:
    generator = random.Random(seed)
    starts = []
    seconds = seconds_alone(config)
    for _ in range(kills):
        world, delay = generator.choice([1, 2, 3]), generator.uniform(0, seconds / kills)
        codes = run(config, world, delay)
        starts.append({"world": world, "delay": delay, "codes": codes})
    world = generator.choice([1, 2, 3])
    starts.append({"world": world, "delay": None, "codes": run(config, world, None)})
    return starts


if __name__ == "__main__":
    path, seed, kills = sys.argv[1:]
    print(json.dumps(kill_and_restart(path, int(seed), int(kills))))
