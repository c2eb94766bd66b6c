"""The interface of stores: sizes and tags of shards, and byte ranges; thread-safe."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from threading import Lock
from typing import ClassVar

LOCAL_GAP_BYTES = 32 << 10
# A request takes some 10 to 30 ms; at 85 MB/s, of one connection to S3, these bytes take 3 ms.
REMOTE_GAP_BYTES = 256 << 10


class ShardReadError(OSError):
    """A shard cannot be read as its index describes it: a transport error, not a bad sample."""


@dataclass(frozen=True)
class ShardState:
    """What a store reports about a shard without reading it.

    `tag` changes whenever the content does (a strong ETag); None where the store has none.
    """

    num_bytes: int
    tag: str | None = None


@dataclass
class TransferCounters:
    """What the transfers of one storage took; guarded by `lock`."""

    num_requests: int = 0  # sent, redirects and repetitions included
    num_retries: int = 0  # requests sent again: refused, timed out, broken off
    num_reopened: int = 0  # of these, transfers that continued within their range
    num_bytes_skipped: int = 0  # read and discarded, because a server ignores Range
    lock: Lock = field(default_factory=Lock, repr=False)


class Storage(ABC):
    """The shards below one root, a directory or a URL without a slash at its end.

    max_gap_bytes: one read over a gap of this size is cheaper than two reads. Such gaps appear
    where some samples are read out of shards that mostly hold others.
    """

    max_gap_bytes: ClassVar[int] = LOCAL_GAP_BYTES

    def __init__(self, root: str, num_readers: int) -> None:
        """`num_readers`: recommended number of reading threads; 0 = reads are fast enough for
        the threads that need the bytes.
        """
        self.root = root
        self.num_readers = num_readers
        self.counters = TransferCounters()

    def where(self, name: str) -> str:
        """The full path or URL of a shard, for messages."""
        return f"{self.root}/{name}"

    @abstractmethod
    def states(self, names: Iterable[str]) -> dict[str, ShardState | None]:
        """State of each named shard, None where it is missing; raise UserError on no access."""

    @abstractmethod
    def read(self, name: str, offset: int, num_bytes: int) -> bytes:
        """Bytes [offset, offset + num_bytes) of a shard; raise ShardReadError if there are fewer.

        A store with tags refuses a shard whose tag differs from the first one seen by `states`,
        `expect` or an earlier read: two contents are never mixed.
        """

    def read_into(self, name: str, offset: int, memory: memoryview) -> None:
        """Fill `memory` with the bytes of a shard from `offset` on; raise as `read` does."""
        memory[:] = self.read(name, offset, len(memory))

    def expect(self, name: str, state: ShardState) -> None:  # noqa: B027 - most need not know
        """Set the state of a shard from which the index was made."""

    def read_whole(self, name: str) -> bytes | None:
        """All bytes of a small file beside the shards; None if it is missing."""
        state = self.states([name])[name]
        return None if state is None else self.read(name, 0, state.num_bytes)

    @abstractmethod
    def close(self) -> None:
        """Close what is open and end remote reads in progress.

        Reading again afterwards is allowed.
        """


class PinnedStates:
    """The first state seen of each shard, which every later response must match; thread-safe."""

    def __init__(self) -> None:
        self._states: dict[str, ShardState] = {}
        self._lock = Lock()

    def get(self, name: str) -> ShardState | None:
        """Return the pinned state of a shard; None if none was seen."""
        return self._states.get(name)

    def expect(self, name: str, state: ShardState) -> None:
        """Pin the state of a shard if none is pinned; add the tag if it was unknown."""
        with self._lock:
            pinned = self._states.setdefault(name, state)
            if pinned.tag is None and pinned.num_bytes == state.num_bytes:
                self._states[name] = state

    def check(self, name: str, where: str, found: ShardState) -> None:
        """Raise ShardReadError, with what changed, unless the shard is still the same."""
        self.expect(name, found)
        pinned = self._states[name]
        changes: list[str] = []
        if found.num_bytes != pinned.num_bytes:
            changes.append(f"it has {found.num_bytes} bytes, not {pinned.num_bytes}")
        if found.tag != pinned.tag:
            changes.append(f"its tag is {found.tag}, not {pinned.tag}")
        if changes:
            raise changed(where, " and ".join(changes))


def changed(where: str, what: str) -> ShardReadError:
    """The error for a shard whose content has changed; it is never retried."""
    return ShardReadError(
        f"{where} changed while it was in use: {what}. Its old and new bytes are never mixed: put "
        "the old shard back, or run `latentmill index` (that makes it another data set)."
    )
