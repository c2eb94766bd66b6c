"""Shards in any other store that fsspec knows (gs, az, hf, sftp, memory ...).

    read --> cat_file of the range, then the file's size and tag: unchanged since the first look

Retries and waits are those of `RemotePolicy`; the time limits of one request are the library's.
"""

import threading
from collections import defaultdict
from collections.abc import Iterable

from pipeline.common.errors import UserError
from pipeline.data.storage.base import (
    REMOTE_GAP_BYTES,
    PinnedStates,
    ShardReadError,
    ShardState,
    Storage,
)
from pipeline.data.storage.filesystem import Filesystem, tag_in
from pipeline.data.storage.policy import RemotePolicy, Retries
from pipeline.data.storage.responses import too_short

PERMANENT = (FileNotFoundError, PermissionError, NotImplementedError, ShardReadError)


class GenericStorage(Storage):
    """The shards below a URL of fsspec's."""

    max_gap_bytes = REMOTE_GAP_BYTES

    def __init__(self, root: str, policy: RemotePolicy) -> None:
        super().__init__(root.rstrip("/"), policy.connections)
        self._files = Filesystem(root)
        self._path = self._files.path
        self._policy = policy
        self._pinned_states = PinnedStates()
        self._stopped = threading.Event()

    def states(self, names: Iterable[str]) -> dict[str, ShardState | None]:
        """State of each named shard by one listing per folder; raise UserError on no access."""
        states: dict[str, ShardState | None] = dict.fromkeys(names)
        folders: dict[str, list[str]] = defaultdict(list)
        for name in states:
            folders[self._full_path(name).rpartition("/")[0]].append(name)
        for folder, inside in folders.items():
            try:
                self._files().invalidate_cache()
                found = {entry["name"]: entry for entry in self._files().ls(folder, detail=True)}
            except FileNotFoundError:
                continue
            except Exception as error:  # every library has its own errors
                raise UserError(f"{self.root} cannot be listed: {error}.") from error
            for name in inside:
                entry = found.get(self._full_path(name))
                if entry is not None and entry["type"] == "file":
                    # Listings may lack what `info` has, so they pin the size alone.
                    states[name] = state = ShardState(entry["size"])
                    self._pinned_states.expect(name, state)
        return states

    def expect(self, name: str, state: ShardState) -> None:
        self._pinned_states.expect(name, state)

    def read(self, name: str, offset: int, num_bytes: int) -> bytes:
        """Bytes [offset, offset + num_bytes) of a shard; raise ShardReadError if that fails."""
        where = self.where(name)
        retries = Retries(self._policy, where, self.counters, self._stopped)
        while True:
            try:
                with self.counters.lock:
                    self.counters.num_requests += 1
                return self._read_once(name, offset, num_bytes)
            except PERMANENT as error:
                if isinstance(error, ShardReadError):
                    raise
                raise ShardReadError(f"{where} cannot be read: {error!r}.") from error
            except Exception as error:  # noqa: BLE001 - every library has its own errors
                retries.after(error, has_progressed=False, is_reopened=False)

    def close(self) -> None:
        """End waiting reads."""
        self._stopped.set()
        self._stopped = threading.Event()

    def _full_path(self, name: str) -> str:
        return f"{self._path}/{name}"

    def _read_once(self, name: str, offset: int, num_bytes: int) -> bytes:
        where, path = self.where(name), self._full_path(name)
        pinned = self._pinned_states.get(name)
        if pinned is None or pinned.tag is None:
            self._check(name)
        data = self._files().cat_file(path, start=offset, end=offset + num_bytes)
        state = self._check(name)  # after the read, so that it covers the bytes
        if state.num_bytes < offset + num_bytes:
            raise too_short(where, state.num_bytes, offset + num_bytes)
        if len(data) != num_bytes:
            raise OSError(f"{len(data)} bytes came, not {num_bytes}")
        return data

    def _check(self, name: str) -> ShardState:
        self._files().invalidate_cache()
        info = self._files().info(self._full_path(name))
        state = ShardState(info["size"], tag_in(info))
        self._pinned_states.check(name, self.where(name), state)
        return state
