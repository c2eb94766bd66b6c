"""What a stream has delivered and spent since it was opened."""

from collections import deque
from dataclasses import dataclass, field

MAX_TIMES = 4096  # the newest decode times, of which percentiles are taken


@dataclass
class StreamCounters:
    """Running totals of one rank."""

    batches: int = 0
    images: int = 0  # slots delivered, tombstones and repeats included
    tombstones: int = 0
    bad_in_row: int = 0  # tombstones at the end of what was delivered
    max_bad_in_row: int = 0
    stall_seconds: float = 0.0  # in next(), waiting for data
    num_ready: int = 0  # batches that lay ready, summed over the calls of next()
    bytes_read: int = 0
    bytes_wanted: int = 0  # of the members themselves
    reads: int = 0
    retries: int = 0  # requests to a remote store sent again
    reopened: int = 0  # of these, transfers that went on in the middle
    # Seconds per image, a mean over each chunk of slots that a thread decoded.
    decode_seconds: deque[float] = field(default_factory=lambda: deque[float](maxlen=MAX_TIMES))
