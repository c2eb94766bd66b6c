"""Where shards lie, and how bytes of them are read: the only place that opens a shard.

    directory, glob or brace pattern -> `find_shards` -> root and names
    name, offset, size -> `Storage.read` -> bytes (cached file descriptors, any number of threads)

Local file systems only so far; other stores implement `Storage`'s three methods.
"""

import os
import re
import resource
import threading
from collections import OrderedDict
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path

from pipeline.errors import UserError

MAX_OPEN_FILES = 256
BRACES = re.compile(r"\{([^{}]*)\}")
NUMERIC_RANGE = re.compile(r"(\d+)\.\.(\d+)")


class ShardReadError(OSError):
    """A shard does not give the bytes that its index promises: a transport fault, no bad sample."""


@dataclass(frozen=True)
class FoundShards:
    """The shards a pattern stands for: `names` are sorted, relative to `root`, with slashes."""

    root: Path
    names: tuple[str, ...]


def expand_braces(pattern: str) -> list[str]:
    """Expand `{a,b}` and `{000..127}` (zero-padded as written), every combination in order."""
    match = BRACES.search(pattern)
    if match is None:
        return [pattern]
    body = match.group(1)
    numbers = NUMERIC_RANGE.fullmatch(body)
    if numbers:
        first, last = numbers.groups()
        choices = [f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1)]
    else:
        choices = body.split(",")
    head, tail = pattern[: match.start()], pattern[match.end() :]
    return [text for choice in choices for text in expand_braces(head + choice + tail)]


def find_shards(pattern: str | Path) -> FoundShards:
    """List the `.tar` files of a directory (not of its sub-folders), glob or brace pattern."""
    text = str(pattern)
    if re.match(r"[a-z][a-z0-9+]*:", text):
        raise UserError(f"{text}: only local paths can be read; copy or mount the shards.")
    if Path(text).is_dir():
        paths = sorted(Path(text).glob("*.tar"))
        root = Path(text)
    else:
        paths = _expand_pattern(text)
        root = Path(os.path.commonpath([path.parent for path in paths])) if paths else Path(text)
    if not paths:
        raise UserError(f"{text}: no .tar shard found there (a folder, a glob or a{{0..9}}.tar).")
    return FoundShards(root, tuple(sorted(path.relative_to(root).as_posix() for path in paths)))


def _expand_pattern(text: str) -> list[Path]:
    paths: set[Path] = set()
    for name in expand_braces(text):
        found = [Path(p) for p in glob(name, recursive=True)] if has_magic(name) else [Path(name)]  # noqa: PTH207
        for path in found:
            if not path.is_file():
                raise UserError(f"{text}: there is no shard {path}.")
        paths.update(found)
    return sorted(paths)


@dataclass
class _OpenFile:
    descriptor: int
    users: int = 0
    is_evicted: bool = False


class Storage:
    """Read byte ranges of the shards below a root directory, from any thread."""

    def __init__(self, root: Path) -> None:
        self.root = root
        soft_limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._max_open = max(1, min(MAX_OPEN_FILES, soft_limit // 4))
        self._files: OrderedDict[str, _OpenFile] = OrderedDict()
        self._lock = threading.Lock()

    def sizes(self, names: list[str]) -> dict[str, int | None]:
        """Bytes of each named shard, None where it is missing; raise UserError on no permission."""
        result: dict[str, int | None] = {}
        for name in names:
            path = self.root / name
            try:
                result[name] = path.stat().st_size
            except (FileNotFoundError, NotADirectoryError):
                result[name] = None
            except PermissionError:
                raise UserError(f"{path} cannot be read: permission denied.") from None
        return result

    def read(self, name: str, offset: int, size: int) -> bytes:
        """Bytes [offset, offset + size) of a shard; raise ShardReadError if it holds fewer."""
        with self._lease(name) as descriptor:
            data = os.pread(descriptor, size, offset)
            while len(data) < size:
                piece = os.pread(descriptor, size - len(data), offset + len(data))
                if not piece:
                    end = os.fstat(descriptor).st_size
                    raise ShardReadError(
                        f"{self.root / name} ends at byte {end}, before "
                        f"{offset + size}: it changed since it was indexed; run `latentmill index`."
                    )
                data += piece
        return data

    def close(self) -> None:
        """Close all descriptors that nobody uses."""
        with self._lock:
            for file in self._files.values():
                self._evict(file)
            self._files.clear()

    @contextmanager
    def _lease(self, name: str) -> Generator[int]:
        """Hold the descriptor of a shard open; the least recently used one gives way."""
        with self._lock:
            file = self._files.pop(name, None) or self._open(name)
            self._files[name] = file
            file.users += 1
            if len(self._files) > self._max_open:
                self._evict(self._files.popitem(last=False)[1])
        try:
            yield file.descriptor
        finally:
            with self._lock:
                file.users -= 1
                if file.is_evicted and file.users == 0:
                    os.close(file.descriptor)

    def _open(self, name: str) -> _OpenFile:
        path = self.root / name
        try:
            return _OpenFile(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        except FileNotFoundError:
            raise ShardReadError(
                f"{path} is gone: put it back, or run `latentmill index` for what is there."
            ) from None

    @staticmethod
    def _evict(file: _OpenFile) -> None:
        file.is_evicted = True
        if file.users == 0:
            os.close(file.descriptor)
