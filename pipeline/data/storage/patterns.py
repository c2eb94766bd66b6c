"""Finding shards: a directory, URL, glob or brace pattern -> root and names.

    text --webdataset's expand_urls--> paths or URLs --globs, listings--> addresses --> root, names

Names are plain text relative to the root, the same for a local path and its URL: a query stays with
the root, and percent signs are decoded.
"""

import importlib
import os
from collections.abc import Sequence
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
NUM_SHOWN = 3


@dataclass(frozen=True)
class FoundShards:
    """The shards a pattern stands for: `names` are sorted, relative to `root`, with slashes."""

    root: str
    names: tuple[str, ...]


def find_shards(pattern: str | Path, remote: RemotePolicy | None = None) -> FoundShards:
    """List the `.tar` files of a directory (not of its sub-folders), glob or brace pattern.

    Braces and `::` expand by webdataset's own rules. Folders and globs need a store that can list:
    http(s) cannot. Raises UserError if no shard is found or a named one is missing.
    """
    text = str(pattern)
    urls = _expand(text)
    if not any(is_url(url) for url in urls):
        return _find_local(text, [local_path(url) for url in urls])
    if not all(is_url(url) for url in urls):
        raise UserError(f"{text} names local paths and URLs: shards must lie in one store.")
    return _find_remote(text, urls, remote)


def _expand(text: str) -> list[str]:
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
        root = Path(expanded[0])
        paths = sorted(root.glob(f"*{SUFFIX}"))
    else:
        paths = _local_files(text, expanded)
        root = Path(os.path.commonpath([path.parent for path in paths])) if paths else Path(text)
    if not paths:
        raise UserError(
            f"{text}: no .tar shard found there (a folder, a glob or a{{0..9}}.tar); looked for "
            f"{_shown(expanded)}."
        )
    names = sorted(path.relative_to(root).as_posix() for path in paths)
    return FoundShards(str(root), tuple(names))


def _local_files(text: str, expanded: list[str]) -> list[Path]:
    paths: set[Path] = set()
    for name in expanded:
        found = [Path(p) for p in glob(name, recursive=True)] if has_magic(name) else [Path(name)]  # noqa: PTH207
        for path in found:
            if not path.is_file():
                raise UserError(
                    f"{text}: there is no shard {path}; the pattern expands to {_shown(expanded)}."
                )
        paths.update(found)
    return sorted(paths)


def _find_remote(text: str, urls: list[str], remote: RemotePolicy | None) -> FoundShards:
    given = [url for url in urls if not _is_listing(url)]
    paths = {_path(url) for url in given}
    for url in urls:
        if _is_listing(url):
            paths.update(_listed(url))
    if not paths:
        raise UserError(f"{text}: no .tar shard found there; looked for {_shown(urls)}.")
    folder = commonpath([path.rpartition("/")[0] or "/" for path in paths]).rstrip("/")
    stores = {_store(url) for url in urls}
    store = stores.pop()
    if stores or not (folder or store[0] in HTTP):
        raise UserError(f"{text}: shards must lie in one store, with one query for all.")
    root = _root(store, folder)
    names = sorted(path.removeprefix(f"{folder}/") for path in paths)
    if given:
        _check_there(text, root, names, remote)
    return FoundShards(root, tuple(names))


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
    return not path.endswith(SUFFIX) or has_magic(path)


def _listed(url: str) -> list[str]:
    """Paths in the store that a folder or glob stands for."""
    if urlsplit(url).scheme in HTTP:
        raise UserError(
            f"{url}: HTTP cannot list shards; name them with braces, as in a{{0000..0127}}.tar."
        )
    files, inside = open_filesystem(url)
    try:
        found = files.glob(inside if has_magic(inside) else f"{inside}/*{SUFFIX}")
    except Exception as error:  # every library has its own errors
        raise UserError(f"{url} cannot be listed ({type(error).__name__}: {error}).") from error
    # fsspec's paths may lack the host that the URL begins with (sftp), or begin with a slash.
    begin = _path(url).rstrip("/").removesuffix(inside.lstrip("/"))
    return [f"{begin}{path.lstrip('/')}" for path in found if path.endswith(SUFFIX)]
