"""The bytes of an export: local files by memory map, remote ones by range requests.

LocalFiles.open, RemoteFiles.open -> ByteFile.view(offset, size) -> uint8 array
"""

import io
import struct
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.common.errors import UserError
from pipeline.data.storage import Storage

Bytes = NDArray[np.uint8]


class ByteFile(ABC):
    """One open file of `size` bytes."""

    size: int
    is_mapped: bool  # into memory, so that a view costs nothing

    @abstractmethod
    def view(self, offset: int, size: int) -> Bytes:
        """Return bytes [offset, offset + size), read only."""

    @abstractmethod
    def arrow(self) -> Any:
        """Return a file object for pyarrow."""


class Files(ABC):
    """All files below the root of an export, by their names in the manifest."""

    @abstractmethod
    def where(self, name: str) -> str:
        """Return the full path or URL of a file, for messages."""

    @abstractmethod
    def open(self, name: str) -> ByteFile:
        """Open a file; raise FileNotFoundError when it is missing."""

    def close(self) -> None:  # noqa: B027 - most hold nothing
        """Close what is open; reading again afterwards is allowed."""

    def read_whole(self, name: str) -> bytes | None:
        """Return all bytes of a small file; None if it is missing."""
        try:
            file = self.open(name)
        except FileNotFoundError:
            return None
        return file.view(0, file.size).tobytes()


class _MappedFile(ByteFile):
    is_mapped = True

    def __init__(self, path: Path) -> None:
        self.size = path.stat().st_size
        empty = np.zeros(0, np.uint8)  # an empty file cannot be mapped
        self._bytes: Bytes = np.asarray(np.memmap(path, np.uint8, "r")) if self.size else empty

    def view(self, offset: int, size: int) -> Bytes:
        return self._bytes[offset : offset + size]

    def arrow(self) -> Any:
        return pa.BufferReader(pa.py_buffer(self._bytes))


class LocalFiles(Files):
    """Files below a directory."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def where(self, name: str) -> str:
        return str(self._root / name)

    def open(self, name: str) -> ByteFile:
        """Map a file into memory; raise FileNotFoundError when it is missing."""
        return _MappedFile(self._root / name)


class _RangeCache:
    """A cache of the most recently read ranges, up to a number of bytes; thread-safe."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._ranges: OrderedDict[tuple[str, int, int], Bytes] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, store: Storage, name: str, offset: int, size: int) -> Bytes:
        key = (name, offset, size)
        with self._lock:
            found = self._ranges.pop(key, None)
            if found is not None:
                self._ranges[key] = found
                return found
        data = np.frombuffer(store.read(name, offset, size), np.uint8)
        with self._lock:
            if key not in self._ranges:
                self._ranges[key] = data
                self._num_bytes += size
            while self._num_bytes > self._max_bytes and len(self._ranges) > 1:
                self._num_bytes -= self._ranges.popitem(last=False)[1].size
        return data


class _RemoteFile(ByteFile):
    is_mapped = False

    def __init__(self, store: Storage, name: str, size: int, cache: _RangeCache) -> None:
        self.size = size
        self._store, self._name, self._cache = store, name, cache

    def view(self, offset: int, size: int) -> Bytes:
        if size == 0:
            return np.zeros(0, np.uint8)
        return self._cache.get(self._store, self._name, offset, size)

    def arrow(self) -> Any:
        return pa.PythonFile(_Seekable(self), mode="r")


class _Seekable(io.RawIOBase):
    """A file object for pyarrow, which asks for footers and column chunks by seek and read."""

    def __init__(self, file: _RemoteFile) -> None:
        super().__init__()
        self._file, self._position = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._file.size}[whence]
        self._position = start + offset
        return self._position

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._file.size - self._position)
        size = left if size < 0 else min(size, left)
        data = self._file.view(self._position, size).tobytes()
        self._position += size
        return data


class RemoteFiles(Files):
    """Files in a store; recently read ranges are cached, up to `cache_bytes`."""

    def __init__(self, store: Storage, cache_bytes: int) -> None:
        self._store = store
        self._cache = _RangeCache(cache_bytes)

    def where(self, name: str) -> str:
        return self._store.where(name)

    def open(self, name: str) -> ByteFile:
        """Ask for a file's size; raise FileNotFoundError when it is missing."""
        state = self._store.states([name])[name]
        if state is None:
            raise FileNotFoundError(self.where(name))
        return _RemoteFile(self._store, name, state.num_bytes, self._cache)

    def close(self) -> None:
        """Close the connections."""
        self._store.close()


def damaged(where: str, what: str) -> UserError:
    """Return the error for a file that does not match the manifest."""
    return UserError(
        f"{where} {what}: the export is damaged or was copied in part. `latentmill verify` on its "
        "directory lists all problems; copy the file again, or repeat the export into an empty "
        "directory."
    )


# Errors of readers, including pyarrow, for damaged bytes.
FAULTS = (
    *(ValueError, LookupError, TypeError, SyntaxError, RecursionError),
    *(struct.error, pa.ArrowException),
)


@contextmanager
def reported_as_damage(where: str) -> Generator[None]:
    """Turn errors that damaged bytes cause into the error for a damaged file.

    Errors of a store that cannot be read pass through: they are not damage.
    """
    try:
        yield
    except FAULTS as error:
        raise damaged(where, f"cannot be read ({error})") from error
    except OSError as error:
        if type(error) is not OSError:  # pyarrow raises the plain one for broken Parquet
            raise
        raise damaged(where, f"cannot be read ({error})") from error
