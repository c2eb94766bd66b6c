"""moto's S3 on a port: `python s3_server.py PORT`, with conditional writes that exclude each other.

moto looks whether an object exists and then writes it: of two requests at once both may succeed,
which S3 rules out. Here those with a condition come one after the other.
"""

import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import run_simple

Environment = dict[str, Any]


class OneAfterTheOther:
    """A WSGI application in which requests with `If-None-Match` wait for each other."""

    def __init__(self, application: Callable[..., Iterable[bytes]]) -> None:
        self._application, self._lock = application, threading.Lock()

    def __call__(self, environment: Environment, start: Callable[..., Any]) -> Iterable[bytes]:
        if "HTTP_IF_NONE_MATCH" not in environment:
            return self._application(environment, start)
        with self._lock:
            return list(self._application(environment, start))


if __name__ == "__main__":
    application = OneAfterTheOther(DomainDispatcherApplication(create_backend_app))
    run_simple("127.0.0.1", int(sys.argv[1]), application, threaded=True)
