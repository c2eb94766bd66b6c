"""Retries of remote reads: how long to wait, and when to give up.

a request fails --Retries.after--> wait (back-off with jitter, Retry-After) and try again,
                               `--> ShardReadError that names the URL and the policy
"""

import logging
import random
import threading
import time
from typing import Annotated

from pydantic import Field

from pipeline.common.component import Component
from pipeline.data.storage.base import ShardReadError, TransferCounters

FIRST_BACKOFF_SECONDS = 0.25  # doubled by each failure in a row
# System randomness: results do not depend on it, and processes must draw different numbers.
JITTER = random.SystemRandom()

WARN_FROM = 3  # failures in a row that are worth a warning

log = logging.getLogger(__name__)

Seconds = Annotated[float, Field(gt=0)]


class RemotePolicy(Component):
    """The `data.remote` section: attempts, time limits and connections; no effect on results.

    A failed request is sent again after a random time of at most 0.25 s * 2^(failures in a row),
    or of the server's Retry-After. A broken transfer continues at the byte where it broke; if it
    brought at least one byte, the count of attempts starts again.
    """

    attempts: Annotated[int, Field(ge=1)] = 8  # requests in a row without a new byte
    timeout_seconds: Seconds = 20.0  # to connect, and between two pieces of a response
    deadline_seconds: Seconds = 300.0  # for one range or part, including all attempts and waits
    max_wait_seconds: Seconds = 30.0  # between two attempts, whatever Retry-After says
    # A transfer slower than this on average (after `timeout_seconds`) continues over another
    # connection, which is usually faster in large stores.
    min_bytes_per_second: Annotated[int, Field(ge=0)] = 16 << 10
    connections: Annotated[int, Field(ge=1)] = 16  # to one host, per process
    part_bytes: Annotated[int, Field(ge=1)] = 8 << 20  # longer ranges are read in parallel parts


class TransferError(Exception):
    """One attempt failed for a temporary reason; `retry_after`: in seconds, from the server."""

    def __init__(self, reason: str, retry_after: float | None = None) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


class Retries:
    """The attempts at one range; raises ShardReadError when the limits are reached."""

    def __init__(
        self,
        policy: RemotePolicy,
        where: str,
        counters: TransferCounters,
        stopped: threading.Event,
    ) -> None:
        self._policy = policy
        self._where = where
        self._counters = counters
        self._stopped = stopped
        self._started = time.monotonic()
        self._num_attempts = 0
        self._num_in_row = 0

    @property
    def seconds_left(self) -> float:
        """Until the deadline; never negative."""
        return max(0.0, self._started + self._policy.deadline_seconds - time.monotonic())

    @property
    def is_stopped(self) -> bool:
        """Whether the storage was closed while this range was being read."""
        return self._stopped.is_set()

    def after(self, fault: Exception, *, has_progressed: bool, is_reopened: bool) -> None:
        """Wait before the next attempt, or raise; `fault`: the error of the last attempt."""
        self._num_attempts += 1
        self._num_in_row = 1 if has_progressed else self._num_in_row + 1
        left = self.seconds_left
        wait = self._wait_seconds(getattr(fault, "retry_after", None))
        if self._num_in_row >= self._policy.attempts or wait >= left or self.is_stopped:
            raise self._given_up(fault) from fault
        log.log(
            logging.WARNING if self._num_in_row >= WARN_FROM else logging.INFO,
            "%s: %s; next attempt in %.1f s",
            self._where,
            fault,
            wait,
        )
        if self._stopped.wait(wait):
            raise self._given_up(fault) from fault
        with self._counters.lock:
            self._counters.num_retries += 1
            self._counters.num_reopened += is_reopened

    def _wait_seconds(self, retry_after: float | None) -> float:
        """Full jitter: readers that failed at the same time retry at different times."""
        highest = FIRST_BACKOFF_SECONDS * 2.0 ** min(self._num_in_row - 1, 30)
        wait = JITTER.uniform(0, min(highest, self._policy.max_wait_seconds))
        if retry_after is not None:
            wait += retry_after
        return min(wait, self._policy.max_wait_seconds)

    def _given_up(self, fault: Exception) -> ShardReadError:
        seconds = time.monotonic() - self._started
        if self.is_stopped:
            return ShardReadError(f"{self._where}: reading was stopped ({fault})")
        policy = self._policy
        return ShardReadError(
            f"{self._where}: {fault}. Given up after {self._num_attempts} attempts in "
            f"{seconds:.1f} s (data.remote: attempts = {policy.attempts} without a new byte, "
            f"deadline_seconds = {policy.deadline_seconds:g}, "
            f"timeout_seconds = {policy.timeout_seconds:g}, "
            f"max_wait_seconds = {policy.max_wait_seconds:g}, "
            f"min_bytes_per_second = {policy.min_bytes_per_second})."
        )
