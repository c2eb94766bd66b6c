"""What stands for `latentmill`, `python` and `accelerate` where the pages are typed.

    shell --argv, streams--> shim --argv, env, cwd--> tests.forkserver --fork--> the command

A command starts at once, from a process that has imported the libraries, and what it starts by
`sys.executable` comes here, too. A training is first checked as it is printed, by `--dry-run`, and
then run in the same words but for its length; `pack sprites` makes fewer samples. Nothing else is
changed. Run by the interpreter without site packages, to start within milliseconds.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

SHORT = ("num_steps=4", "optimizer.learning_rate.warmup_samples=0")
NUM_SPRITES = 600
LATENTMILL, LAUNCHER = ["-m", "pipeline"], ["-m", "accelerate.commands.launch"]
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
INSIDE = "SHIM_INSIDE"  # in the environment of what a command starts


def is_training(words: list[str]) -> bool:
    """Whether these words start a training."""
    starts = words[:3] == [*LATENTMILL, "train"] or "pipeline.train" in words
    return starts and not {"--help", "-h", "--dry-run", "--check"} & {*words}


def shortened(words: list[str]) -> list[str]:
    """The same command with less to do."""
    if is_training(words):
        keys = tuple(f"{setting.partition('=')[0]}=" for setting in SHORT)
        return [*(w for w in words if not w.removeprefix("--").startswith(keys)), *SHORT]
    if words[:4] == [*LATENTMILL, "pack", "sprites"] and "--count" in words:
        place = words.index("--count") + 1
        return [*words[:place], str(min(int(words[place]), NUM_SPRITES)), *words[place + 1 :]]
    return words


def module_or_script(name: str, given: list[str]) -> list[str] | None:
    """What an interpreter is to run; None for anything else that it can be told."""
    if name == "latentmill":
        return [*LATENTMILL, *given]
    if name == "accelerate":
        return [*LAUNCHER, *given[1:]] if given[:1] == ["launch"] else None
    is_plain = given[:1] == ["-m"] or "".join(given[:1]).endswith(".py")
    return given if is_plain else None


def run(server: str, argv: list[str], output: str) -> int:
    """Have the server fork a command, with our streams; return its exit code.

    server: its socket; empty: no server, the command is started as usual.
    """
    if not server:
        with Path(output).open("ab") as file:
            return subprocess.call([sys.executable, "-P", *argv[1:]], stdout=file)
    request = {
        "argv": argv,
        "log": output,
        "errors": f"/proc/{os.getpid()}/fd/2",
        "env": {**os.environ, INSIDE: "1"},
        "cwd": str(Path.cwd()),
    }
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(server)
        connection.sendall(json.dumps(request).encode() + b"\n")
        with connection.makefile("r") as answers:
            pid = int(answers.readline())
            for number in PASSED_ON:
                signal.signal(number, lambda number, _: os.kill(pid, number))
            code = int(answers.readline())
    return code if code >= 0 else 128 - code


def main(server: str, real: str, shims: str, name: str, *given: str) -> int:
    """Run the command `name` with the words `given`; return its exit code.

    real: the folder of the commands that the ones in `shims` stand for.
    """
    words = module_or_script(name, [*given])
    if words is None:
        os.execv(f"{real}/{name}", [f"{real}/{name}", *given])
    python, output = f"{shims}/python", f"/proc/{os.getpid()}/fd/1"
    if INSIDE in os.environ:
        return run(server, [python, *words], output)
    if is_training(words) and (code := run(server, [python, *words, "--dry-run"], os.devnull)):
        return code
    return run(server, [python, *shortened(words)], output)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
