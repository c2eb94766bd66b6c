"""Shards in S3 and compatible stores: listed by s3fs, read by signed URLs over HTTP.

    states --s3fs, list_objects_v2--> sizes and ETags
    read --> HttpStorage, each request with a URL that was signed just before

So S3 has the same retries, limits and checks as HTTP. Credentials, region and endpoint come from
where AWS's tools find them: AWS_ACCESS_KEY_ID ..., AWS_PROFILE, AWS_ENDPOINT_URL, ~/.aws, the
role of the instance; or from fsspec's configuration (FSSPEC_S3_ANON=true for public buckets).
"""

import os
from collections import defaultdict
from collections.abc import Iterable

from fsspec.config import conf

from pipeline.common.errors import UserError
from pipeline.data.storage.base import ShardReadError, ShardState
from pipeline.data.storage.filesystem import Filesystem
from pipeline.data.storage.http import HttpStorage
from pipeline.data.storage.policy import RemotePolicy

SIGNATURE_SECONDS = 3600  # above every deadline, so that a response is never cut off


class S3Storage(HttpStorage):
    """The shards below `s3://bucket/prefix`."""

    def __init__(self, root: str, policy: RemotePolicy) -> None:
        # botocore still signs URLs by version 2 in some regions, which newer stores, and AWS for
        # objects under a KMS key, refuse.
        config = {"signature_version": "s3v4"} | conf.get("s3", {}).get("config_kwargs", {})
        self._files = Filesystem(root, config_kwargs=config)
        self._path = self._files.path
        super().__init__(root, policy)

    def where(self, name: str) -> str:
        """The URL of a shard."""
        return f"{self.root}/{name}"

    def states(self, names: Iterable[str]) -> dict[str, ShardState | None]:
        """State of each named shard by one listing per folder; raise UserError on no access."""
        states: dict[str, ShardState | None] = dict.fromkeys(names)
        folders: dict[str, list[str]] = defaultdict(list)
        for name in states:
            folder, _, base = name.rpartition("/")
            folders[folder].append(base)
        for folder, bases in folders.items():
            above = f"{folder}/" if folder else ""
            # List by the common prefix of the names: a single name is one short request.
            prefix = os.path.commonprefix(bases)  # noqa: RUF071 - by character, as S3 has it
            for base, state in self._list(f"{self._path}/{above}".rstrip("/"), prefix).items():
                name = f"{above}{base}"
                if name in states:
                    states[name] = state
                    self._pinned_states.expect(name, state)
        return states

    def _list(self, folder: str, prefix: str) -> dict[str, ShardState]:
        """State of each object right below `folder` whose name begins with `prefix`."""
        try:
            self._files().invalidate_cache()
            found = self._files().find(folder, prefix=prefix, detail=True)
        except FileNotFoundError:
            return {}
        except Exception as error:  # botocore's own errors have no common importable base
            raise UserError(
                f"s3://{folder} cannot be listed ({type(error).__name__}: {error}). Credentials, "
                "region and endpoint come from the environment (AWS_...), ~/.aws or fsspec's "
                "configuration."
            ) from error
        start = len(folder) + 1
        return {
            path[start:]: ShardState(info["size"], info["ETag"])
            for path, info in found.items()
            if info["type"] == "file"
        }

    def _url(self, name: str) -> str:
        try:
            return self._files().url(f"{self._path}/{name}", expires=SIGNATURE_SECONDS)
        except Exception as error:  # as above
            raise ShardReadError(
                f"{self.where(name)}: the request cannot be signed ({type(error).__name__}: "
                f"{error}). Credentials come from the environment (AWS_...), ~/.aws or fsspec's "
                "configuration."
            ) from error
