"""Checks of HTTP responses to range requests, before any byte is used.

status and headers --check_response--> RangeResponse: which bytes follow, of which shard state
                          |--> TransferError: temporary (429, 5xx, contradictory headers)
                          `--> ShardReadError: permanent (401, 403, 404, too short ...)
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from pipeline.data.storage.base import ShardReadError, ShardState
from pipeline.data.storage.policy import TransferError

# Temporary 4xx; of the 5xx only "not implemented" and "HTTP version" are permanent.
TRANSIENT_4XX = frozenset((408, 425, 429))
PERMANENT_5XX = frozenset((501, 505))
# A server that ignores Range sends the whole shard. At most this many bytes before the wanted range
# are skipped: more would amount to a second download of the data set per epoch.
MAX_SKIPPED_BYTES = 4 << 20

MARKUP = re.compile(r"<[^>]*>")
CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")
UNSATISFIED = re.compile(r"bytes \*/(\d+)")


@dataclass(frozen=True)
class RangeResponse:
    """The body holds `num_skipped` bytes to discard, then the `num_bytes` requested ones."""

    state: ShardState
    num_skipped: int
    num_bytes: int


def is_transient(status: int) -> bool:
    """Tell whether the same request may succeed later."""
    return status in TRANSIENT_4XX or (status >= 500 and status not in PERMANENT_5XX)


def retry_after_seconds(headers: Mapping[str, str]) -> float | None:
    """Seconds of a Retry-After header (a number or an HTTP date); None without a valid one."""
    text = headers.get("Retry-After", "").strip()
    if text.isascii() and text.isdigit():
        return float(text)
    try:
        date = parsedate_to_datetime(text)
    except ValueError:
        return None
    if date.tzinfo is None:
        date = date.replace(tzinfo=UTC)
    return max(0.0, (date - datetime.now(UTC)).total_seconds())


def tag_of(headers: Mapping[str, str]) -> str | None:
    """The ETag, or else the date of the last change."""
    return headers.get("ETag") or headers.get("Last-Modified")


def is_strong(tag: str | None) -> bool:
    """Whether a tag may be used in If-Match: an ETag that is not weak."""
    return tag is not None and tag.startswith('"')


def whole_length(headers: Mapping[str, str]) -> int | None:
    """Content-Length of a response; None without a valid one."""
    text = headers.get("Content-Length", "").strip()
    return int(text) if text.isascii() and text.isdigit() else None


def refusal(where: str, status: int, headers: Mapping[str, str], text: str) -> Exception:
    """The error for a response without data; `text`: the beginning of its body."""
    words = MARKUP.sub(" ", text).split()
    said = f": {' '.join(words)}" if words else ""
    if is_transient(status):
        return TransferError(f"HTTP status {status}{said}", retry_after_seconds(headers))
    reason = {
        401: "needs credentials (HTTP 401)",
        403: "may not be read (HTTP 403)",
        404: "is gone (HTTP 404): put it back, or run `latentmill index` for what is there",
        410: "is gone (HTTP 410): put it back, or run `latentmill index` for what is there",
    }.get(status, f"cannot be read (HTTP {status})")
    return ShardReadError(f"{where} {reason}{said}. This is not tried again.")


def too_short(where: str, size: int, stop: int) -> ShardReadError:
    """The error for a shard that ends before the wanted bytes do."""
    return ShardReadError(
        f"{where} ends at byte {size}, before {stop}: it changed since it was indexed; run "
        "`latentmill index`."
    )


def check_response(
    where: str, status: int, headers: Mapping[str, str], offset: int, num_bytes: int
) -> RangeResponse:
    """Check a response of status 206, 200 or 416 to a request for [offset, offset + num_bytes)."""
    encoding = headers.get("Content-Encoding", "identity")
    if encoding != "identity":
        raise TransferError(f"the response is compressed ({encoding}), which was not requested")
    if status == 416:
        match = UNSATISFIED.fullmatch(headers.get("Content-Range", ""))
        raise too_short(where, int(match[1]) if match else offset, offset + num_bytes)
    if status == 200:
        return _check_whole(where, headers, offset, num_bytes)
    match = CONTENT_RANGE.fullmatch(headers.get("Content-Range", ""))
    if match is None:
        raise TransferError(f"a response 206 with Content-Range {headers.get('Content-Range')!r}")
    first, last, size = map(int, match.groups())
    if size < offset + num_bytes:
        raise too_short(where, size, offset + num_bytes)
    length = last - first + 1
    # A server may send less than requested (the rest is requested next), but no other bytes.
    if first != offset or not 1 <= length <= num_bytes:
        raise TransferError(
            f"the response holds bytes {first}-{last}, not {offset}-{offset + num_bytes - 1}"
        )
    announced = whole_length(headers)
    if announced not in (None, length):
        raise TransferError(f"Content-Length {announced} for a range of {length} bytes")
    return RangeResponse(ShardState(size, tag_of(headers)), 0, length)


def _check_whole(
    where: str, headers: Mapping[str, str], offset: int, num_bytes: int
) -> RangeResponse:
    size = whole_length(headers)
    if size is None:
        raise TransferError("the server ignores Range and does not say how long the shard is")
    if size < offset + num_bytes:
        raise too_short(where, size, offset + num_bytes)
    if offset > MAX_SKIPPED_BYTES:
        raise TransferError(
            f"the server ignores Range, and {offset} bytes lie before the wanted ones (at most "
            f"{MAX_SKIPPED_BYTES} are skipped): shards need a server that knows byte ranges"
        )
    return RangeResponse(ShardState(size, tag_of(headers)), offset, num_bytes)
