"""Finding shards: a directory, URL, glob or brace pattern -> root and names.

    text --webdataset's expand_urls--> paths or URLs --globs, listings--> addresses --> root, names

Names are plain text relative to the root, the same for a local path and its URL: a query stays with
the root, and percent signs are decoded.
"""

import importlib
import os
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path
from posixpath import commonpath
from typing import Any
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from pipeline.common.errors import UserError
from pipeline.data.storage.filesystem import open_filesystem
from pipeline.data.storage.opening import HTTP, check_scheme, is_url, local_path, open_storage
from pipeline.data.storage.policy import RemotePolicy

SUFFIX = ".tar"
# Endings of files that hold a shard, of which byte ranges cannot be read.
_ENDINGS = ".tar.gz .tgz .tar.zst .tzst .tar.bz2 .tbz2 .tbz .tar.xz .txz .tar.lz4 .tar.Z"
COMPRESSED = tuple(_ENDINGS.split())
FORMATS = {"gz": "gzip", "zst": "zstd", "bz": "bzip2", "xz": "xz", "lz4": "lz4", "Z": "compress"}
NUM_SHOWN = 3


@dataclass(frozen=True)
class FoundShards:
    """The shards a pattern stands for: `names` are sorted, relative to `root`, with slashes.

    compressed: files that were passed over, since byte ranges of them cannot be read.
    """

    root: str
    names: tuple[str, ...]
    compressed: tuple[str, ...] = ()


def find_shards(pattern: str | Path, remote: RemotePolicy | None = None) -> FoundShards:
    """List the `.tar` files of a directory (not of its sub-folders), glob or brace pattern.

    Braces and `::` expand by webdataset's own rules. Folders and globs need a store that can list:
    http(s) cannot. Raises UserError if no shard is found or a named one is missing.
    """
    text = str(pattern)
    urls = expand(text)
    if not any(is_url(url) for url in urls):
        return _find_local(text, [local_path(url) for url in urls])
    if not all(is_url(url) for url in urls):
        raise UserError(f"{text} names local paths and URLs: shards must lie in one store.")
    return _find_remote(text, urls, remote)


def expand(text: str) -> list[str]:
    """Expand braces and `::` by webdataset's rules; raise UserError for a bad brace."""
    check_urls = [url for url in text.split("::") if is_url(url)]
    for url in check_urls:
        check_scheme(url)
    # Imported here: it imports torch, and `latentmill verify EXPORT` must work without both.
    shardlists: Any = importlib.import_module("webdataset.shardlists")
    try:
        return list(shardlists.expand_urls(text))
    except (AssertionError, ValueError) as error:  # of an unset WDS_ variable, of a bad brace
        raise UserError(f"{text} cannot be expanded: {error}.") from None


def _shown(addresses: Sequence[str]) -> str:
    more = f", ... ({len(addresses)} in all)" if len(addresses) > NUM_SHOWN else ""
    return ", ".join(addresses[:NUM_SHOWN]) + more


def _find_local(text: str, expanded: list[str]) -> FoundShards:
    if len(expanded) == 1 and Path(expanded[0]).is_dir():
        folder = Path(expanded[0])
        with os.scandir(folder) as entries:
            found = [folder / e.name for e in entries if _is_shard(e.name) and not e.is_dir()]
        folders = [folder]
    else:
        found = _local_files(text, expanded)
        folders = [path.parent for path in found if not path.name.endswith(COMPRESSED)]
    root = os.path.commonpath(folders or [path.parent for path in found] or [text])
    names = {Path(os.path.relpath(path, root)).as_posix() for path in found}
    compressed = _compressed(names)
    shards = sorted(name for name in names if not name.endswith(COMPRESSED))
    if not shards:
        raise UserError(
            f"{text}: no .tar shard found there (a folder, a glob or a{{0..9}}.tar); looked for "
            f"{_shown(expanded)}.{_remedy(compressed)}"
        )
    return FoundShards(root, tuple(shards), compressed)


def _is_shard(path: str) -> bool:
    """Tell whether a listed file is a shard, perhaps compressed; macOS leaves `._a.tar` beside."""
    return path.endswith((SUFFIX, *COMPRESSED)) and not path.rpartition("/")[2].startswith("._")


def _compressed(names: Iterable[str]) -> tuple[str, ...]:
    """The compressed shards among some files, except those whose shard is there, too."""
    there = set(names)
    found = (name for name in there if name.endswith(COMPRESSED))
    return tuple(sorted(name for name in found if _decompressed(name) not in there))


def _decompressed(name: str) -> str:
    stem = name.rpartition(".")[0]
    return stem if stem.endswith(SUFFIX) else f"{stem}{SUFFIX}"


def _remedy(compressed: Sequence[str]) -> str:
    if not compressed:
        return ""
    named = [f"{name} ({_format_of(name)})" for name in compressed]
    return f" {_shown(named)}: decompress it; byte ranges cannot be read."


def _format_of(name: str) -> str:
    end = name.rpartition(".")[2].removeprefix("t")
    return next(text for start, text in FORMATS.items() if end.startswith(start))


def _local_files(text: str, expanded: list[str]) -> list[Path]:
    paths: set[Path] = set()
    for name in expanded:
        if has_magic(name):
            found = map(Path, glob(name, recursive=True))  # noqa: PTH207
            paths.update(path for path in found if not path.is_dir())
        elif Path(name).is_file():
            paths.add(Path(name))
        else:
            raise UserError(
                f"{text}: there is no shard {name}; the pattern expands to {_shown(expanded)}."
            )
    return list(paths)


def _find_remote(text: str, urls: list[str], remote: RemotePolicy | None) -> FoundShards:
    given = [url for url in urls if not _is_listing(url)]
    found = {_path(url) for url in given}
    found |= {path for url in urls if _is_listing(url) for path in _listed(url)}
    paths = {path for path in found if not path.endswith(COMPRESSED)}
    if not paths:
        compressed = _compressed(found)
        raise UserError(
            f"{text}: no .tar shard found there; looked for {_shown(urls)}.{_remedy(compressed)}"
        )
    folder = commonpath([path.rpartition("/")[0] or "/" for path in paths]).rstrip("/")
    stores = {_store(url) for url in urls}
    store = stores.pop()
    if stores or not (folder or store[0] in HTTP):
        raise UserError(f"{text}: shards must lie in one store, with one query for all.")
    root = _root(store, folder)
    names = sorted(path.removeprefix(f"{folder}/") for path in paths)
    compressed = _compressed(path.removeprefix(f"{folder}/") for path in found)
    if given:
        _check_there(text, root, names, remote)
    return FoundShards(root, tuple(names), compressed)


def _check_there(text: str, root: str, names: Sequence[str], remote: RemotePolicy | None) -> None:
    with closing(open_storage(root, remote)) as storage:
        states = storage.states(names)
        missing = [storage.where(name) for name in names if states[name] is None]
        expanded = [storage.where(name) for name in names]
    if missing:
        raise UserError(
            f"{text}: there is no shard {_shown(missing)}; the pattern expands to "
            f"{_shown(expanded)}."
        )


def _store(url: str) -> tuple[str, str, str]:
    """What must be the same for all shards: scheme, and for HTTP the host and the query."""
    parts = urlsplit(url)
    is_http = parts.scheme in HTTP
    return parts.scheme, parts.netloc if is_http else "", parts.query if is_http else ""


def _path(url: str) -> str:
    """The path in the store with a leading slash; for HTTP with percent signs decoded."""
    parts = urlsplit(url)
    return unquote(parts.path) if parts.scheme in HTTP else f"/{url.partition('://')[2]}"


def _root(store: tuple[str, str, str], folder: str) -> str:
    scheme, host, query = store
    if scheme in HTTP:
        return urlunsplit((scheme, host, quote(folder), query, ""))
    return f"{scheme}://{folder[1:]}"


def _is_listing(url: str) -> bool:
    path = _path(url)
    return not path.endswith((SUFFIX, *COMPRESSED)) or has_magic(path)


def _listed(url: str) -> list[str]:
    """Paths in the store that a folder or glob stands for."""
    if urlsplit(url).scheme in HTTP:
        raise UserError(
            f"{url}: HTTP cannot list shards; name them with braces, as in a{{0000..0127}}.tar."
        )
    files, inside = open_filesystem(url)
    try:
        found = files.glob(inside if has_magic(inside) else f"{inside}/*")
    except Exception as error:  # every library has its own errors
        raise UserError(f"{url} cannot be listed ({type(error).__name__}: {error}).") from error
    # fsspec's paths may lack the host that the URL begins with (sftp), or begin with a slash.
    begin = _path(url).rstrip("/").removesuffix(inside.lstrip("/"))
    return [f"{begin}{path.lstrip('/')}" for path in found if _is_shard(path)]
