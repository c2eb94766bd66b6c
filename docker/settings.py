"""Where this machine gets its packages from, as pip and apt know it, for steps in another root."""

import ast
import re
import subprocess
import sys

MACHINE = "/mnt"  # where a step finds this machine's files, if a setting of pip names some


def pip_settings() -> str:
    """This machine's settings as one pip.conf, later sources over earlier ones, as pip reads them.

    Files and folders that it names are found by a step below MACHINE.
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
    """How this machine's apt acquires packages: proxies, time-outs, checks of the date."""
    dump = subprocess.run(
        ["apt-config", "dump", "Acquire"], check=True, capture_output=True, text=True
    )
    return "".join(
        line + "\n"
        for line in dump.stdout.splitlines()
        if re.match(r'Acquire::(https?|Retries|Check-\S+)(::\S+)? ".+";', line)
    )
