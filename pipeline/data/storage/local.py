"""Shards on local and mounted file systems: positional reads over a pool of open descriptors."""

import os
import resource
import threading
from collections import OrderedDict
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pipeline.common.errors import UserError
from pipeline.data.storage.base import ShardReadError, ShardState, Storage
from pipeline.data.storage.mounts import is_networked

MAX_OPEN_FILES = 256
NETWORK_READERS = 8  # concurrent reads from a file server


@dataclass
class _OpenFile:
    descriptor: int
    users: int = 0
    is_evicted: bool = False


class LocalStorage(Storage):
    """The shards below a directory."""

    def __init__(self, root: str) -> None:
        super().__init__(root, NETWORK_READERS if is_networked(root) else 0)
        soft_limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._max_open = max(1, min(MAX_OPEN_FILES, soft_limit // 4))
        self._files: OrderedDict[str, _OpenFile] = OrderedDict()
        self._lock = threading.Lock()

    def states(self, names: Iterable[str]) -> dict[str, ShardState | None]:
        """State of each named shard, None where it is missing; raise UserError on no access."""
        result: dict[str, ShardState | None] = {}
        for name in names:
            path = self.where(name)
            try:
                result[name] = ShardState(Path(path).stat().st_size)
            except (FileNotFoundError, NotADirectoryError):
                result[name] = None
            except PermissionError:
                raise UserError(f"{path} cannot be read: permission denied.") from None
        return result

    def read(self, name: str, offset: int, num_bytes: int) -> bytes:
        """Bytes [offset, offset + num_bytes) of a shard; raise ShardReadError if it is shorter."""
        with self._lease(name) as descriptor:
            data = os.pread(descriptor, num_bytes, offset)
        if len(data) == num_bytes:
            return data
        memory = bytearray(num_bytes)
        self.read_into(name, offset, memoryview(memory))
        return bytes(memory)

    def read_into(self, name: str, offset: int, memory: memoryview) -> None:
        """Fill `memory` with the bytes of a shard from `offset` on; raise as `read` does."""
        with self._lease(name) as descriptor:
            num_read = os.preadv(descriptor, [memory], offset)
            while num_read < len(memory):
                more = os.preadv(descriptor, [memory[num_read:]], offset + num_read)
                if more == 0:
                    end = os.fstat(descriptor).st_size
                    raise ShardReadError(
                        f"{self.where(name)} ends at byte {end}, before {offset + len(memory)}: it "
                        "changed since it was indexed; run `latentmill index`."
                    )
                num_read += more

    def close(self) -> None:
        """Close all unused descriptors."""
        with self._lock:
            for file in self._files.values():
                self._evict(file)
            self._files.clear()

    @contextmanager
    def _lease(self, name: str) -> Generator[int]:
        """Keep the descriptor of a shard open; evict the least recently used one."""
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
        path = self.where(name)
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
