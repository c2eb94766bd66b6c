"""The location of an index while it is built: its directory, or a temporary one if it is remote.

    remote tables --fetch--> temporary directory --index_shard--> table --upload, at once--> remote
                                                                  manifest --upload, last--> remote

So a stopped build continues from the existing tables, local or remote.
"""

from collections.abc import Generator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pipeline.common.errors import UserError
from pipeline.common.files import write_json
from pipeline.data.index.manifest import (
    INDEX_DIRECTORY,
    MANIFEST,
    TABLES,
    table_name,
    table_path,
)
from pipeline.data.storage import is_url, open_storage
from pipeline.data.storage.opening import local_path, open_writable
from pipeline.data.storage.threads import map_in_threads
from pipeline.data.storage.writable import WritableStore

FETCH_THREADS = 16


class IndexLocation:
    """The local directory of an index that is being built, and its remote store, if any."""

    def __init__(self, folder: Path, store: WritableStore | None) -> None:
        self.folder = folder
        self._store = store

    def add_table(self, shard_name: str) -> None:
        """Upload a table that was written or is up to date, if the index is remote."""
        if self._store is not None:
            self._store.put(table_name(shard_name), table_path(self.folder, shard_name))

    def finish(self, manifest: dict[str, Any], names: Sequence[str]) -> None:
        """Write the manifest and delete the tables of shards that are not in `names`."""
        path = self.folder / INDEX_DIRECTORY / MANIFEST
        write_json(path, manifest)
        if self._store is not None:
            self._store.put(f"{INDEX_DIRECTORY}/{MANIFEST}", path)
            return
        wanted = {table_path(self.folder, name) for name in names}
        for file in (self.folder / INDEX_DIRECTORY / TABLES).rglob("*"):
            if file.is_file() and file not in wanted:  # of a removed shard or a killed build
                file.unlink()


@contextmanager
def index_location(out: Path | str, shard_names: Sequence[str]) -> Generator[IndexLocation]:
    """Open the location of an index in `out`, a directory or URL; UserError if not writable."""
    if is_url(out):
        store = open_writable(str(out))
        with TemporaryDirectory(prefix="latentmill-index-") as folder:
            _fetch_tables(str(out), shard_names, Path(folder))
            yield IndexLocation(Path(folder), store)
        return
    folder = Path(local_path(out))
    try:
        (folder / INDEX_DIRECTORY / TABLES).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{folder / INDEX_DIRECTORY} cannot be created ({error.strerror}): name a directory "
            "that can be written with --out."
        ) from None
    yield IndexLocation(folder, None)


def _fetch_tables(root: str, shard_names: Sequence[str], folder: Path) -> None:
    """Download the existing tables."""
    with closing(open_storage(root)) as storage:
        states = storage.states([table_name(name) for name in shard_names])
        found = [(name, state.num_bytes) for name, state in states.items() if state is not None]

        def fetch(file: tuple[str, int]) -> None:
            name, num_bytes = file
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(storage.read(name, 0, num_bytes))

        map_in_threads(fetch, found, FETCH_THREADS)
    (folder / INDEX_DIRECTORY / TABLES).mkdir(parents=True, exist_ok=True)
