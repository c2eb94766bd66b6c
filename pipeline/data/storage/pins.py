"""The state in which each shard of a store was first seen: what every later answer must match."""

import threading

from pipeline.data.storage.base import ShardReadError, ShardState


class Pins:
    """Which size and tag each shard must have; safe from any thread."""

    def __init__(self) -> None:
        self._states: dict[str, ShardState] = {}
        self._lock = threading.Lock()

    def get(self, name: str) -> ShardState | None:
        """What is known of a shard; None before the first sight."""
        return self._states.get(name)

    def expect(self, name: str, state: ShardState) -> None:
        """Pin a shard that was not seen yet; a tag that was unknown is taken over."""
        with self._lock:
            pinned = self._states.setdefault(name, state)
            if pinned.tag is None and pinned.num_bytes == state.num_bytes:
                self._states[name] = state

    def check(self, name: str, where: str, found: ShardState) -> None:
        """Raise ShardReadError that says what changed, unless the shard is still the same."""
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
    """The error for a shard that is another one now; it is never retried."""
    return ShardReadError(
        f"{where} changed while it was in use: {what}. Its old and new bytes are never mixed: put "
        "the old shard back, or run `latentmill index` (that makes it another data set)."
    )
