"""Reads our Dockerfile and .dockerignore; any instruction that they do not use is an error."""

import json
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import translate
from pathlib import Path

KEYWORDS = ("ARG", "COPY", "ENTRYPOINT", "ENV", "RUN", "USER", "WORKDIR")


class DockerfileError(Exception):
    """An instruction that is not supported, or something that is missing."""


@dataclass(frozen=True)
class Instruction:
    """One instruction of a stage, its continued lines joined as Docker joins them."""

    keyword: str
    flags: tuple[str, ...]  # of COPY and RUN, as `--name=value`
    rest: str

    def __str__(self) -> str:
        """As one line."""
        return " ".join([self.keyword, *self.flags, self.rest])

    def flag(self, name: str) -> list[str]:
        """The values of every `--name=value`."""
        start = f"--{name}="
        return [flag.removeprefix(start) for flag in self.flags if flag.startswith(start)]


@dataclass(frozen=True)
class Stage:
    """From one FROM to the next; `base` is an image or a stage's name."""

    name: str
    base: str
    instructions: list[Instruction] = field(default_factory=list)

    def needs(self) -> Iterator[str]:
        """The stages and images that must exist before this one."""
        yield self.base
        for instruction in self.instructions:
            yield from instruction.flag("from")


def expand(text: str, values: Mapping[str, str]) -> str:
    """Replace $NAME and ${NAME}; an unset name is an error (Docker would ignore it)."""

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name not in values:
            raise DockerfileError(f"{text}: {name} is not set.")
        return values[name]

    return re.sub(r"\$(?:\{(\w+)\}|(\w+))", value, text)


def _logical_lines(text: str) -> Iterator[str]:
    """Instructions with their continuations joined and the comments left out."""
    joined = ""
    for line in text.splitlines():
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        if line.rstrip().endswith("\\"):
            joined += line.rstrip()[:-1]
        else:
            yield joined + line
            joined = ""
    if joined:
        raise DockerfileError(f"the file ends inside: {joined}")


def _instruction(line: str) -> Instruction:
    keyword, _, rest = line.strip().partition(" ")
    flags: list[str] = []
    while found := re.match(r"\s*(--[a-z]+=\S+)", rest):
        flags.append(found[1])
        rest = rest[found.end() :]
    return Instruction(keyword, tuple(flags), rest.strip())


def parse(text: str, arguments: Mapping[str, str]) -> dict[str, Stage]:
    """The stages by name; `arguments` are those of --build-arg, for the ARGs before them."""
    stages: dict[str, Stage] = {}
    first: dict[str, str] = {}
    current: Stage | None = None
    for line in _logical_lines(text):
        instruction = _instruction(line)
        if instruction.keyword == "FROM":
            found = re.fullmatch(r"(\S+) AS ([a-z][a-z-]*)", instruction.rest)
            if found is None or instruction.flags:
                raise DockerfileError(f"not `FROM image AS name`: {line}")
            current = Stage(found[2], expand(found[1], first))
            stages[current.name] = current
        elif instruction.keyword not in KEYWORDS:
            raise DockerfileError(f"{instruction.keyword} is not one of {', '.join(KEYWORDS)}.")
        elif current is not None:
            current.instructions.append(instruction)
        else:
            name, _, default = instruction.rest.partition("=")
            first[name] = arguments.get(name, default)
    return stages


def required(stages: Mapping[str, Stage], target: str) -> list[Stage]:
    """The stages that `target` needs, in the sequence of their builds; `target` is the last."""
    if target not in stages:
        raise DockerfileError(f"no stage {target}: there are {', '.join(stages)}.")
    needed: list[Stage] = []
    for name in stages[target].needs():
        if name in stages:
            needed += [stage for stage in required(stages, name) if stage not in needed]
    return [*needed, stages[target]]


def assignments(text: str) -> dict[str, str]:
    """NAME=value ... of an ENV, unquoted."""
    return dict(word.split("=", 1) for word in shlex.split(text))


def mount(flag: str) -> dict[str, str]:
    """The options of a --mount; an option without a value, such as rw, is its own value."""
    return {name: value or name for name, _, value in (p.partition("=") for p in flag.split(","))}


def words(text: str) -> list[str]:
    """The words of an instruction in its JSON form."""
    parsed = json.loads(text)
    if not isinstance(parsed, list) or not all(isinstance(word, str) for word in parsed):
        raise DockerfileError(f"not a list of strings: {text}")
    return parsed


def _matches(pattern: str, path: str) -> bool:
    """Whether a pattern of .dockerignore matches this path or one of its folders."""
    # `**/` matches any number of folders, also none; `*` matches within one name.
    any_depth = pattern.startswith("**/")
    parts, names = pattern.removeprefix("**/").split("/"), path.split("/")
    starts = range(len(names)) if any_depth else range(1)
    return any(
        len(names) - start >= len(parts)
        and all(re.match(translate(p), n) for p, n in zip(parts, names[start:], strict=False))
        for start in starts
    )


def context(root: Path) -> list[Path]:
    """The files of the build context below `root`, relative to it, sorted."""
    rules: list[tuple[bool, str]] = []
    for line in (root / ".dockerignore").read_text().splitlines():
        if line.strip() and not line.startswith("#"):
            pattern = line.strip().removeprefix("!").strip("/")
            if "**" in pattern.removeprefix("**/"):
                raise DockerfileError(f"{line}: ** is supported at the start only.")
            rules.append((line.startswith("!"), pattern))
    if (False, "*") not in rules[:1]:
        raise DockerfileError(".dockerignore does not open with *, so that its names are all of it")
    found: list[Path] = []
    for top in sorted({pattern.split("/")[0] for kept, pattern in rules if kept}):
        for path in _files(root / top):
            relative = path.relative_to(root).as_posix()
            matches = [kept for kept, pattern in rules if _matches(pattern, relative)]
            if matches[-1]:  # the last rule that matches decides
                found.append(Path(relative))
    return sorted(found)


def _files(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
    for folder, _, names in os.walk(path):
        yield from (Path(folder, name) for name in names)


def sources(instruction: Instruction) -> Sequence[str]:
    """The sources of a COPY, without its destination."""
    return instruction.rest.split()[:-1]
