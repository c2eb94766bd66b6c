"""From what a user writes to shards: a directory, glob or brace pattern -> root and names."""

import os
import re
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path

from webdataset.shardlists import expand_urls

from pipeline.errors import UserError

IS_URL = re.compile(r"[a-z][a-z0-9+]*:")


@dataclass(frozen=True)
class FoundShards:
    """The shards a pattern stands for: `names` are sorted, relative to `root`, with slashes."""

    root: str
    names: tuple[str, ...]


def is_url(location: str | Path) -> bool:
    """Tell whether a location names a store other than the local file systems."""
    return IS_URL.match(str(location)) is not None


def find_shards(pattern: str | Path) -> FoundShards:
    """List the `.tar` files of a directory (not of its sub-folders), glob or brace pattern.

    Braces and `::` expand by webdataset's own rules.
    """
    text = str(pattern)
    if is_url(text):
        raise UserError(f"{text}: only local paths can be read; copy or mount the shards.")
    if Path(text).is_dir():
        paths = sorted(Path(text).glob("*.tar"))
        root = Path(text)
    else:
        paths = _expand_pattern(text)
        root = Path(os.path.commonpath([path.parent for path in paths])) if paths else Path(text)
    if not paths:
        raise UserError(f"{text}: no .tar shard found there (a folder, a glob or a{{0..9}}.tar).")
    names = sorted(path.relative_to(root).as_posix() for path in paths)
    return FoundShards(str(root), tuple(names))


def _expand_pattern(text: str) -> list[Path]:
    paths: set[Path] = set()
    for name in expand_urls(text):
        found = [Path(p) for p in glob(name, recursive=True)] if has_magic(name) else [Path(name)]  # noqa: PTH207
        for path in found:
            if not path.is_file():
                raise UserError(f"{text}: there is no shard {path}.")
        paths.update(found)
    return sorted(paths)
