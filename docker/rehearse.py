"""Runs the steps of the Dockerfile without Docker, and then a command in the resulting folder.

    Dockerfile -> stages -> one folder each: debootstrap, or a copy of the stage it starts from
               -> ARG ENV WORKDIR COPY RUN in it, in own namespaces -> ENTRYPOINT + COMMAND

On Debian, as root: apt-get install debootstrap, then

    python3 docker/rehearse.py [--target cpu] [--work FOLDER] [-- COMMAND ...]

It needs the network for packages of Debian and Python, about 5 GB of disk and five minutes. The
steps use this machine's settings of pip, apt and host names, as Docker's builds would; nothing of
them stays in the result. A folder given as --work keeps the base and pip's downloads, which halves
the time of the next rehearsal.
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from dockerfile import (
    DockerfileError,
    Instruction,
    Stage,
    assignments,
    context,
    expand,
    mount,
    parse,
    required,
    sources,
    words,
)
from settings import MACHINE, apt_settings, pip_settings

ROOT = Path(__file__).resolve().parents[1]
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"  # as Docker's


def say(line: str) -> None:
    """Print a line about the progress."""
    print(f"== {line}", flush=True)


def run(argv: Sequence[str | Path]) -> None:
    """Run a command that must succeed."""
    subprocess.run([str(word) for word in argv], check=True)


class Rehearsal:
    """Builds stages as folders in `work`; `kept`: for files that the next rehearsal reuses."""

    def __init__(self, work: Path, kept: Path, arguments: Mapping[str, str]) -> None:
        self._work = work
        self._kept = kept
        self._arguments = arguments
        self._environments: dict[str, dict[str, str]] = {}
        self._directories: dict[str, str] = {}
        self._pip = work / "pip.conf"
        self._pip.write_text(pip_settings())
        kept.mkdir(exist_ok=True)

    def rehearse(self, target: str, command: Sequence[str]) -> int:
        """Build `target` and start `command` in it; returns the command's exit code."""
        stages = parse((ROOT / "docker/Dockerfile").read_text(), self._arguments)
        for stage in required(stages, target):
            self.build(stage)
        return self.start(stages[target], command)

    def root(self, stage: str) -> Path:
        """The folder of a stage's files."""
        return self._work / "stages" / stage

    def build(self, stage: Stage) -> None:
        """Make the stage's folder and run its instructions in it."""
        root = self.root(stage.name)
        root.parent.mkdir(exist_ok=True)
        if stage.base in self._environments:
            run(["cp", "--archive", "--reflink=auto", self.root(stage.base), root])
            self._environments[stage.name] = dict(self._environments[stage.base])
            self._directories[stage.name] = self._directories[stage.base]
        else:
            run(["cp", "--archive", "--reflink=auto", self._image(stage.base), root])
            self._environments[stage.name] = {"PATH": DEFAULT_PATH, "HOME": "/root"}
            self._directories[stage.name] = "/"
        arguments: dict[str, str] = {}
        for instruction in stage.instructions:
            started = time.monotonic()
            say(f"{stage.name}: {instruction}")
            self._apply(stage, instruction, arguments)
            say(f"{time.monotonic() - started:.1f} s")

    def _image(self, image: str) -> Path:
        """A root folder with the image's Debian release, as of today; created once and kept."""
        found = re.fullmatch(r"debian:([a-z]+)(-\d+)?-slim(@\S+)?", image)
        if found is None:
            raise DockerfileError(f"{image}: only debian:RELEASE-DATE-slim can be rehearsed.")
        base = self._kept / f"debian-{found[1]}"
        if not base.exists():
            say(f"debootstrap {found[1]}, for {image}")
            unfinished = base.with_suffix(".part")
            shutil.rmtree(unfinished, ignore_errors=True)
            run(["debootstrap", "--variant=minbase", found[1], unfinished])
            unfinished.rename(base)
        return base

    def _apply(self, stage: Stage, instruction: Instruction, arguments: dict[str, str]) -> None:
        environment = self._environments[stage.name]
        match instruction.keyword:
            case "ARG":
                name, _, default = instruction.rest.partition("=")
                if value := self._arguments.get(name, default):
                    arguments[name] = value
            case "ENV":
                environment |= assignments(expand(instruction.rest, environment))
            case "WORKDIR":
                self._directories[stage.name] = instruction.rest
                self._inside(stage.name, instruction.rest).mkdir(parents=True, exist_ok=True)
            case "COPY":
                self._copy(stage, instruction)
            case "RUN":
                self._run_step(stage, instruction, environment | arguments)
            case _:  # USER and ENTRYPOINT: read by start()
                pass

    def _inside(self, stage: str, path: str) -> Path:
        """The path on this machine of a path of the stage."""
        return self.root(stage) / os.path.join(self._directories[stage], path).lstrip("/")  # noqa: PTH118

    def _copy(self, stage: Stage, instruction: Instruction) -> None:
        """COPY as in Docker: of a folder its content; a file goes into DEST/."""
        to = instruction.rest.split()[-1]
        target = self._inside(stage.name, to)
        other = instruction.flag("from")
        if unknown := [flag for flag in instruction.flags if not flag.startswith("--from=")]:
            raise DockerfileError(f"COPY: {', '.join(unknown)} cannot be rehearsed.")
        for source in sources(instruction):
            path = self._inside(other[0], source) if other else self._context() / source
            if not path.exists():
                raise DockerfileError(f"COPY {source}: not there; does .dockerignore keep it out?")
            if path.is_dir():
                target.mkdir(parents=True, exist_ok=True)
                run(["cp", "--archive", f"{path}/.", target])
            else:
                into = target / path.name if to.endswith("/") else target
                into.parent.mkdir(parents=True, exist_ok=True)
                run(["cp", "--archive", path, into])

    def _context(self) -> Path:
        """A folder with the files of the build context only, owned by root."""
        folder = self._work / "context"
        if not folder.exists():
            for path in context(ROOT):
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / path, folder / path)
        return folder

    def _mounts(self, stage: str, flags: Sequence[str]) -> list[tuple[Path, str]]:
        """The mounts of a RUN's --mount flags: (path here, path in the stage)."""
        mounts: list[tuple[Path, str]] = []
        for flag in flags:
            options = mount(flag)
            match options["type"]:
                case "cache":
                    here = self._kept / options["target"].strip("/").replace("/", "-")
                    here.mkdir(exist_ok=True)
                case "secret":
                    here = self._pip
                case "bind":  # a copy: what a step writes there is discarded
                    here = self._work / f"bound-by-{stage}"
                    shutil.copytree(self._context(), here, dirs_exist_ok=True)
                case kind:
                    raise DockerfileError(f"--mount=type={kind} cannot be rehearsed.")
            mounts.append((here, options["target"]))
        return mounts

    def _run_step(
        self, stage: Stage, instruction: Instruction, environment: Mapping[str, str]
    ) -> None:
        apt = self.root(stage.name) / "etc/apt/apt.conf.d/99machine"
        apt.write_text(apt_settings())
        mounts = self._mounts(stage.name, instruction.flag("mount"))
        try:
            argv = ("/bin/sh", "-c", instruction.rest)
            code = self._enter(stage.name, argv, environment, mounts, user="0")
        finally:
            apt.unlink()
        if code:
            raise DockerfileError(f"{stage.name}: exit code {code} of {instruction}")

    def start(self, stage: Stage, command: Sequence[str]) -> int:
        """Run ENTRYPOINT with `command` as the image's user; return its exit code."""
        last: dict[str, str] = {}
        for instruction in stage.instructions:
            last[instruction.keyword] = instruction.rest
        argv = (*words(last["ENTRYPOINT"]), *command)
        say(f"as user {last['USER']}: {shlex.join(argv)}")
        environment = self._environments[stage.name]
        return self._enter(stage.name, argv, environment, [], user=last["USER"])

    def _enter(
        self,
        stage: str,
        argv: Sequence[str],
        environment: Mapping[str, str],
        mounts: Sequence[tuple[Path, str]],
        *,
        user: str,
    ) -> int:
        """Run as process 1 in the stage's folder; its mounts disappear with it."""
        root, lines = self.root(stage), ["set -e"]
        lines += ["mount -t proc proc proc", "mount --rbind /dev dev", "mount --rbind /sys sys"]
        for name in ("etc/resolv.conf", "etc/hosts"):  # as Docker makes them for a container
            shutil.copy(Path("/", name), root / name)
        if mounts:
            lines += [f"mount --bind / .{MACHINE}", f"mount -o remount,ro,bind .{MACHINE}"]
        for here, there in mounts:
            inside = root / there.lstrip("/")
            inside.parent.mkdir(parents=True, exist_ok=True)
            inside.mkdir(exist_ok=True) if here.is_dir() else inside.touch()
            lines.append(f"mount --bind {shlex.quote(str(here))} .{shlex.quote(there)}")
        clean = [f"{name}={value}" for name, value in environment.items()]
        change = f'cd {shlex.quote(self._directories[stage])} && exec "$0" "$@"'
        inner = ["env", "-i", *clean, "/bin/sh", "-c", change, *argv]
        lines.append(f"exec chroot --userspec={user} . {shlex.join(inner)}")
        namespaces = ("unshare", "--mount", "--pid", "--fork", "--kill-child")
        shell = (*namespaces, "/bin/sh", "-c", "\n".join(lines))
        return subprocess.run(shell, cwd=root, stdin=subprocess.DEVNULL, check=False).returncode


def parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    top = argparse.ArgumentParser(description="Rehearse docker/Dockerfile without Docker.")
    top.add_argument("--target", default="cpu", help="stage of the Dockerfile (%(default)s)")
    top.add_argument("--work", type=Path, help="folder to keep the base and pip's downloads in")
    top.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE")
    top.add_argument("--plan", action="store_true", help="print the steps, and run none")
    top.add_argument("--context", action="store_true", help="print the files Docker would be sent")
    top.add_argument("command", nargs="*", help="what the container runs (the entrypoint's choice)")
    return top


def main() -> int:
    """Run the command line; return the exit code."""
    options = parser().parse_args()
    try:
        return run_options(options)
    except (DockerfileError, subprocess.CalledProcessError) as error:
        print(error, file=sys.stderr)
        return 1


def run_options(options: argparse.Namespace) -> int:
    """Rehearse, or print the plan or the build context; return the exit code."""
    arguments = dict(pair.split("=", 1) for pair in options.build_arg)
    if options.context:
        print(*context(ROOT), sep="\n")
        return 0
    if options.plan:
        text = (ROOT / "docker/Dockerfile").read_text()
        for stage in required(parse(text, arguments), options.target):
            print(f"FROM {stage.base} AS {stage.name}", *stage.instructions, sep="\n")
        return 0
    if missing := [name for name in ("debootstrap", "unshare", "chroot") if not shutil.which(name)]:
        raise DockerfileError(f"missing here: {', '.join(missing)}.")
    if os.geteuid():
        raise DockerfileError("a rehearsal changes its root folder: start it as root.")
    with tempfile.TemporaryDirectory(prefix="rehearsal-") as scratch:
        kept = options.work or Path(scratch, "kept")
        rehearsal = Rehearsal(Path(scratch), kept.resolve(), arguments)
        return rehearsal.rehearse(options.target, options.command)


if __name__ == "__main__":
    sys.exit(main())
