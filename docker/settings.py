"""This machine's settings of pip and apt, for steps that run in another root folder."""

import ast
import re
import subprocess
import sys

MACHINE = "/mnt"  # mount point, in a step, of this machine's files that pip's settings name


def pip_settings() -> str:
    """Return this machine's settings of pip as one pip.conf; later sources override earlier ones.

    Paths in it are changed to paths below MACHINE.
    """
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], check=True, capture_output=True, text=True
    )
    settings: dict[str, str] = {}
    rank = {"global": 0, "install": 1, ":env:": 2}
    lines = [line.partition("=") for line in listed.stdout.splitlines()]
    for name, _, value in sorted(lines, key=lambda one: rank.get(one[0].rpartition(".")[0], 0)):
        settings[name.rpartition(".")[2]] = str(ast.literal_eval(value))
    moved = {
        name: re.sub(r"(^|\s)(file://[^/\s]*)?(/\S*)", rf"\1\2{MACHINE}\3", value)
        for name, value in settings.items()
    }
    return "\n".join(["[global]", *(f"{name} = {value}" for name, value in moved.items()), ""])


def apt_settings() -> str:
    """Return apt's settings for downloads: proxies, timeouts, checks of dates."""
    dump = subprocess.run(
        ["apt-config", "dump", "Acquire"], check=True, capture_output=True, text=True
    )
    return "".join(
        line + "\n"
        for line in dump.stdout.splitlines()
        if re.match(r'Acquire::(https?|Retries|Check-\S+)(::\S+)? ".+";', line)
    )
