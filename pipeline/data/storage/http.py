"""Shards behind HTTP: exactly the bytes asked for, of exactly one state of each shard.

    read --parts of at most part_bytes, in parallel--> GET with Range and If-Match
      `--> status, Content-Range, length and tag checked --> bytes; a fault --> Retries --> Range
           from the byte where it broke

A server that ignores Range works near the start of a shard only (`responses.MAX_SKIPPED_BYTES`).
Credentials: in the URL (`https://user:password@host`), in its query, or in ~/.netrc. Proxies: from
the environment (HTTPS_PROXY, NO_PROXY). No message contains credentials or queries.
"""

import netrc
import threading
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from urllib.parse import quote, unquote, urljoin, urlsplit, urlunsplit

import urllib3
from urllib3 import BaseHTTPResponse
from urllib3.exceptions import HTTPError, SSLError

from pipeline.common.errors import UserError
from pipeline.data.storage.base import (
    REMOTE_GAP_BYTES,
    PinnedStates,
    ShardReadError,
    ShardState,
    Storage,
    changed,
)
from pipeline.data.storage.connections import OpenConnections
from pipeline.data.storage.policy import RemotePolicy, Retries, TransferError
from pipeline.data.storage.responses import (
    check_response,
    is_strong,
    refusal,
    tag_of,
    whole_length,
)
from pipeline.data.storage.threads import map_in_threads

MAX_REDIRECTS = 5
PIECE_BYTES = 1 << 20
MAX_ERROR_TEXT = 300  # bytes of an error's body that are shown
REDIRECTS = frozenset((301, 302, 303, 307, 308))


class HttpStorage(Storage):
    """The shards below `http(s)://host/path`; a query of the root goes with every request."""

    max_gap_bytes = REMOTE_GAP_BYTES

    def __init__(self, root: str, policy: RemotePolicy) -> None:
        super().__init__(root.rstrip("/"), policy.connections)
        self._policy = policy
        self._pinned_states = PinnedStates()
        self._stopped = threading.Event()
        self._parts = urlsplit(self.root)
        self._headers = {"Accept-Encoding": "identity"} | _credentials(self.root)
        self._opened = OpenConnections()
        host, num = self._parts.hostname or "", policy.connections
        self._pool = self._opened.new_pool(self._parts.scheme, host, num)

    def where(self, name: str) -> str:
        """The URL of a shard without credentials and query."""
        return _shown(self._url(name))

    def states(self, names: Iterable[str]) -> dict[str, ShardState | None]:
        """State of each named shard, None where it is missing; raise UserError on no access."""
        wanted = list(dict.fromkeys(names))
        try:
            found = map_in_threads(self._state, wanted, self._policy.connections)
        except ShardReadError as error:
            raise UserError(str(error)) from None
        for name, state in zip(wanted, found, strict=True):
            if state is not None:
                self._pinned_states.expect(name, state)
        return dict(zip(wanted, found, strict=True))

    def expect(self, name: str, state: ShardState) -> None:
        self._pinned_states.expect(name, state)

    def read(self, name: str, offset: int, num_bytes: int) -> bytes:
        """Bytes [offset, offset + num_bytes) of a shard; raise ShardReadError if that fails."""
        longest = self._policy.part_bytes
        if num_bytes <= longest:
            return self._read_part(name, offset, num_bytes)
        # Equal parts, so that no small part is read alone at the end.
        num_parts = -(-num_bytes // longest)
        cuts = [offset + part * num_bytes // num_parts for part in range(num_parts + 1)]
        pieces = map_in_threads(
            lambda part: self._read_part(name, part[0], part[1] - part[0]),
            list(pairwise(cuts)),
            self._policy.connections,
        )
        return b"".join(pieces)

    def close(self) -> None:
        """End reads in progress and close the connections."""
        self._stopped.set()
        self._stopped = threading.Event()
        self._opened.break_off()
        self._pool.clear()

    def _url(self, name: str) -> str:
        parts = self._parts
        return urlunsplit(parts._replace(path=f"{parts.path}/{quote(name)}"))

    def _new_retries(self, where: str) -> Retries:
        return Retries(self._policy, where, self.counters, self._stopped)

    def _read_part(self, name: str, offset: int, num_bytes: int) -> bytes:
        """Read one range over one connection at a time."""
        retries = self._new_retries(self.where(name))
        pieces: list[bytes] = []
        num_read = 0
        while num_read < num_bytes:
            before = num_read
            try:
                for piece in self._pieces(name, offset + num_read, num_bytes - num_read, retries):
                    pieces.append(piece)
                    num_read += len(piece)
            except (TransferError, HTTPError, OSError) as fault:
                if isinstance(fault, ShardReadError):
                    raise
                _raise_if_permanent(self.where(name), fault)
                retries.after(fault, has_progressed=num_read > before, is_reopened=num_read > 0)
        return b"".join(pieces)

    def _pieces(self, name: str, offset: int, num_bytes: int, retries: Retries) -> Iterator[bytes]:
        """Send one request, check the response, and yield the requested bytes as they arrive."""
        where = self.where(name)
        pinned = self._pinned_states.get(name)
        headers = {"Range": f"bytes={offset}-{offset + num_bytes - 1}"}
        if pinned is not None and pinned.tag is not None and is_strong(pinned.tag):
            headers["If-Match"] = pinned.tag
        response = self._send("GET", self._url(name), headers, retries)
        try:
            if response.status == 412 and "If-Match" in headers:
                now = tag_of(response.headers)
                raise changed(where, f"it is no longer {headers['If-Match']}, but {now}")
            if response.status not in (200, 206, 416):
                raise _refusal(where, response)
            checked = check_response(where, response.status, response.headers, offset, num_bytes)
            self._pinned_states.check(name, where, checked.state)
            yield from self._body(response, checked.num_skipped, checked.num_bytes, retries)
        finally:
            _finish(response)

    def _body(
        self, response: BaseHTTPResponse, num_skipped: int, num_bytes: int, retries: Retries
    ) -> Iterator[bytes]:
        """Yield the body's bytes after the first `num_skipped`."""
        left = num_skipped + num_bytes
        budget = self._policy.timeout_seconds
        if self._policy.min_bytes_per_second:
            budget += left / self._policy.min_bytes_per_second
            too_slow_at = retries.seconds_left - budget
        else:
            too_slow_at = 0.0
        while left:
            if retries.is_stopped or retries.seconds_left <= 0:
                raise TransferError(f"{left} bytes of the response did not arrive in time")
            if retries.seconds_left < too_slow_at:
                raise TransferError(f"slower than {self._policy.min_bytes_per_second} bytes/s")
            piece = response.read1(min(left, PIECE_BYTES), decode_content=False)
            if not piece:
                raise TransferError(f"the response ended {left} bytes early")
            left -= len(piece)
            if num_skipped:
                with self.counters.lock:
                    self.counters.num_bytes_skipped += min(num_skipped, len(piece))
                piece, num_skipped = piece[num_skipped:], max(0, num_skipped - len(piece))
            if piece:
                yield piece

    def _state(self, name: str) -> ShardState | None:
        """Ask for a shard's state, with retries; None if it is missing."""
        retries = self._new_retries(self.where(name))
        method = "HEAD"
        while True:
            try:
                headers = {"Range": "bytes=0-0"} if method == "GET" else {}
                response = self._send(method, self._url(name), headers, retries)
                try:
                    status, length = response.status, whole_length(response.headers)
                    if status in (404, 410):
                        return None
                    if method == "HEAD" and (status in (403, 405, 501) or length is None):
                        method = "GET"  # signed URLs and some servers allow nothing else
                        continue
                    if status not in (200, 206, 416):
                        raise _refusal(self.where(name), response)
                    return _state_of(self.where(name), response)
                finally:
                    if method == "HEAD":
                        response.read()  # empty: lets the connection be reused
                    _finish(response)
            except (TransferError, HTTPError, OSError) as fault:
                if isinstance(fault, ShardReadError):
                    raise
                _raise_if_permanent(self.where(name), fault)
                retries.after(fault, has_progressed=False, is_reopened=False)

    def _send(
        self, method: str, url: str, headers: dict[str, str], retries: Retries
    ) -> BaseHTTPResponse:
        """Send one request and follow redirects; the caller closes the response."""
        headers = self._headers | headers
        for _ in range(MAX_REDIRECTS + 1):
            seconds = min(self._policy.timeout_seconds, max(retries.seconds_left, 0.001))
            with self.counters.lock:
                self.counters.num_requests += 1
            response = self._pool.urlopen(
                method,
                url,
                redirect=False,
                headers=headers,
                retries=False,
                timeout=urllib3.Timeout(connect=seconds, read=seconds),
                pool_timeout=max(retries.seconds_left, 0.001),
                preload_content=False,
                decode_content=False,
            )
            target = response.headers.get("Location")
            if response.status not in REDIRECTS or not target:
                return response
            _finish(response)
            old, url = url, urljoin(url, target)
            if urlsplit(url).netloc != urlsplit(old).netloc:
                headers.pop("authorization", None)  # as urllib3 spells it
            if urlsplit(url).scheme not in ("https", urlsplit(old).scheme):
                raise ShardReadError(f"{_shown(old)} redirects to {_shown(url)}: not followed.")
        raise ShardReadError(f"{_shown(url)}: more than {MAX_REDIRECTS} redirects in a row.")


def _finish(response: BaseHTTPResponse) -> None:
    """Release the connection; it is reused only if the body was read completely."""
    response.close()
    response.release_conn()


def _state_of(where: str, response: BaseHTTPResponse) -> ShardState:
    """The state in a response to HEAD, or to GET of the first byte."""
    size = whole_length(response.headers)
    if response.status == 206:
        return check_response(where, 206, response.headers, 0, 1).state
    if response.status == 416:
        size = 0  # there is no first byte
    if size is None:
        raise TransferError("the server does not say how long the shard is")
    return ShardState(size, tag_of(response.headers))


def _refusal(where: str, response: BaseHTTPResponse) -> Exception:
    """The error for a status, with the beginning of the response's body."""
    try:
        text = response.read1(MAX_ERROR_TEXT, decode_content=False).decode("utf-8", "replace")
    except HTTPError:
        text = ""  # the status says enough
    return refusal(where, response.status, response.headers, text)


def _raise_if_permanent(where: str, fault: Exception) -> None:
    """Raise ShardReadError for an untrusted certificate: a retry would not help."""
    if isinstance(fault, SSLError) and "CERTIFICATE_VERIFY_FAILED" in str(fault):
        raise ShardReadError(f"{where}: {fault}. This is not tried again.") from fault


def _credentials(root: str) -> dict[str, str]:
    """The Authorization header, if the URL or ~/.netrc holds credentials for the host."""
    parts = urlsplit(root)
    if parts.username is not None:
        pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        return urllib3.make_headers(basic_auth=pair)
    file = Path("~/.netrc").expanduser()
    if not file.is_file():
        return {}
    try:
        found = netrc.netrc(str(file)).authenticators(parts.hostname or "")
    except netrc.NetrcParseError as error:
        raise UserError(f"{file} cannot be read: {error}.") from None
    return urllib3.make_headers(basic_auth=f"{found[0]}:{found[2]}") if found else {}


def _shown(url: str) -> str:
    """Return a URL without secrets, for messages."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
