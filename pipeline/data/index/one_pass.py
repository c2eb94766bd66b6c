"""One forward pass over a shard in any store: each byte is read once and goes into its SHA-256.

    Storage.read, one chunk ahead --> `read`, `crc32`: forward, as the tar reader asks
                                  `-> `sha256` of the whole, at the end

Reading back is possible page by page, up to a limit: only damaged shards need it.
"""

import hashlib
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from types import TracebackType
from typing import Self

from pipeline.data.storage import ShardReadError, Storage, is_url

LOCAL_CHUNK_BYTES = 1 << 20
# A request to a remote store takes tens of milliseconds at any size.
REMOTE_CHUNK_BYTES = 8 << 20
PAGE_BYTES = 1 << 18
MAX_PAGES = 16
# How many times the shard's size may be read again. A shard with forged headers that point all over
# it ends with an error instead of hours of reading.
MAX_TIMES_BACK = 8


class OnePass:
    """Reads a shard once; use a `with` statement. Holds at most three chunks and 16 pages."""

    def __init__(self, storage: Storage, name: str, num_bytes: int) -> None:
        self._storage = storage
        self._name = name
        self._num_bytes = num_bytes
        self._chunk_bytes = REMOTE_CHUNK_BYTES if is_url(storage.root) else LOCAL_CHUNK_BYTES
        self._digest = hashlib.sha256()
        self._chunk, self._start = b"", 0  # the newest chunk
        self._bytes_back_left = MAX_TIMES_BACK * num_bytes + MAX_PAGES * PAGE_BYTES
        self._page = lru_cache(maxsize=MAX_PAGES)(self._read_page)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="one-pass")
        self._next: Future[bytes] = self._request(0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def read(self, offset: int, num_bytes: int) -> bytes:
        """Bytes [offset, offset + num_bytes), fewer at the end of the shard."""
        stop = min(offset + num_bytes, self._num_bytes)
        pieces: list[bytes] = []
        while offset < stop:
            if offset < self._start:
                piece = self._look_back(offset, min(stop, self._start))
            elif offset < self._start + len(self._chunk):
                piece = self._chunk[offset - self._start : stop - self._start]
            else:
                self._advance()
                continue
            pieces.append(piece)
            offset += len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def crc32(self, offset: int, num_bytes: int) -> int:
        """CRC-32 (zlib's) of bytes [offset, offset + num_bytes)."""
        checksum, stop = 0, offset + num_bytes
        while offset < stop:
            piece = self.read(offset, min(stop - offset, self._chunk_bytes))
            checksum = zlib.crc32(piece, checksum)
            offset += len(piece)
        return checksum

    def sha256(self) -> str:
        """Hex digest of the whole shard; reads the rest of it first."""
        while self._start + len(self._chunk) < self._num_bytes:
            self._advance()
        return self._digest.hexdigest()

    def _request(self, offset: int) -> Future[bytes]:
        num_bytes = min(self._chunk_bytes, self._num_bytes - offset)
        if num_bytes == 0:  # remote stores reject empty ranges
            return self._thread.submit(bytes)
        return self._thread.submit(self._storage.read, self._name, offset, num_bytes)

    def _advance(self) -> None:
        self._start += len(self._chunk)
        self._chunk = self._next.result()
        self._next = self._request(self._start + len(self._chunk))
        self._digest.update(self._chunk)

    def _look_back(self, offset: int, stop: int) -> bytes:
        number = offset // PAGE_BYTES
        start = number * PAGE_BYTES
        return self._page(number)[offset - start : stop - start]

    def _read_page(self, number: int) -> bytes:
        start = number * PAGE_BYTES
        num_bytes = min(PAGE_BYTES, self._num_bytes - start)
        self._bytes_back_left -= num_bytes
        if self._bytes_back_left < 0:
            raise ShardReadError(
                f"{self._storage.where(self._name)} would have to be read more than "
                f"{MAX_TIMES_BACK} times to find what is in it: it is too damaged; leave it out."
            )
        return self._storage.read(self._name, start, num_bytes)
