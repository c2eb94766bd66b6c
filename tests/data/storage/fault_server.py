"""An HTTP server on 127.0.0.1 that serves byte ranges and misbehaves to order.

    request -> `plan` picks a Fault, or None -> headers and bytes onto the socket, right or wrong

It writes to the socket itself, so that every wrong answer is exactly as wrong as the test wants.
"""

import random
import socket
import socketserver
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from typing import NamedTuple

JUNK = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\njunk"
TRICKLE_BYTES_PER_SECOND = 1000


class Request(NamedTuple):
    number: int  # counts from 0
    method: str
    path: str
    headers: Mapping[str, str]


class Answer(NamedTuple):
    """A right answer, which a fault then spoils."""

    status: int
    headers: dict[str, str]
    body: bytes


def head_bytes(status: int, headers: Mapping[str, str]) -> bytes:
    lines = [f"HTTP/1.1 {status} X", *(f"{key}: {value}" for key, value in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode()


Fault = Callable[["Connection", Answer, random.Random], None]
Plan = Callable[[Request], Fault | None]


def always(fault: Fault | None) -> Plan:
    return lambda _: fault


NO_FAULT = always(None)


class Connection:
    """One client's socket."""

    def __init__(self, client: socket.socket, server: "FaultServer", request: Request) -> None:
        self.client = client
        self.server = server
        self.request = request

    def head(self, status: int, headers: Mapping[str, str]) -> None:
        self.client.sendall(head_bytes(status, headers))

    def reset(self) -> None:
        """Close with RST, as a machine does that has died."""
        self.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.end()

    def end(self) -> None:
        raise ConnectionAbortedError

    def part(self, answer: Answer, rng: random.Random) -> None:
        """The right headers, and a random part of the body, possibly nothing."""
        self.head(answer.status, answer.headers)
        self.client.sendall(answer.body[: rng.randrange(len(answer.body) + 1) // 2])


def reset(connection: Connection, answer: Answer, rng: random.Random) -> None:
    if rng.random() < 0.3:
        connection.reset()  # before a single byte
    connection.part(answer, rng)
    time.sleep(0.002)
    connection.reset()


def stall(connection: Connection, answer: Answer, rng: random.Random) -> None:
    if rng.random() < 0.7:
        connection.part(answer, rng)
    connection.server.stopped.wait(30)
    connection.end()


def status(number: int, **headers: str) -> Fault:
    def fault(connection: Connection, answer: Answer, rng: random.Random) -> None:
        said = headers or {}
        if number == 429 and not said:
            said = {"Retry-After": rng.choice(["0", "1", formatdate(usegmt=True), "soon"])}
        named = {key.replace("_", "-"): value for key, value in said.items()}
        connection.head(number, {"Content-Length": "4", **named})
        if connection.request.method != "HEAD":  # else it would begin the next answer
            connection.client.sendall(b"busy")

    return fault


def short_body(connection: Connection, answer: Answer, rng: random.Random) -> None:
    connection.part(answer, rng)
    connection.end()


def long_body(connection: Connection, answer: Answer, rng: random.Random) -> None:
    """More bytes than were announced; they may even look like the next answer."""
    connection.head(answer.status, answer.headers)
    connection.client.sendall(answer.body + rng.choice([JUNK, b"\0" * 5000, b"x"]))


def wrong_length(connection: Connection, answer: Answer, rng: random.Random) -> None:
    length = len(answer.body)
    wrong = rng.choice([length + rng.randrange(1, 5000), rng.randrange(length), -7])
    headers = {**answer.headers, "Content-Length": str(wrong)}
    connection.head(answer.status, headers)
    connection.client.sendall(answer.body)
    connection.end()


def wrong_range(connection: Connection, answer: Answer, rng: random.Random) -> None:
    """Bytes of another place, honestly labelled."""
    content = connection.server.files[connection.request.path]
    first = rng.randrange(len(content))
    body = content[first : first + len(answer.body)]
    said = f"bytes {first}-{first + len(body) - 1}/{len(content)}"
    headers = {**answer.headers, "Content-Range": said, "Content-Length": str(len(body))}
    connection.head(206, headers)
    connection.client.sendall(body)


def ignored_range(connection: Connection, answer: Answer, rng: random.Random) -> None:
    content = connection.server.files[connection.request.path]
    headers = {k: v for k, v in answer.headers.items() if k != "Content-Range"}
    connection.head(200, {**headers, "Content-Length": str(len(content))})
    connection.client.sendall(content)


def trickle(connection: Connection, answer: Answer, rng: random.Random) -> None:
    everything = head_bytes(answer.status, answer.headers) + answer.body
    for start in range(0, len(everything), 20):
        connection.client.sendall(everything[start : start + 20])
        if connection.server.stopped.wait(20 / TRICKLE_BYTES_PER_SECOND):
            connection.end()


def changed(connection: Connection, answer: Answer, rng: random.Random) -> None:
    """From now on there is another object; some servers do not even know If-Match."""
    server, path = connection.server, connection.request.path
    content = server.files[path]
    if rng.random() < 0.5:
        content += b"more"
    server.files[path] = bytes(byte ^ 0xFF for byte in content)
    server.tags[path] = server.tags.get(path, 0) + 1
    server.knows_if_match = rng.random() < 0.5
    right = server.answer(connection.request)
    connection.head(right.status, right.headers)
    connection.client.sendall(right.body)


@dataclass
class FaultServer:
    """What is served, and what was asked."""

    files: dict[str, bytes]  # path, without a slash at its begin -> content
    plan: Plan = NO_FAULT
    seed: int = 0
    has_tags: bool = True
    knows_if_match: bool = True
    seconds_per_answer: float = 0.0
    tags: dict[str, int] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    num_faults: int = 0
    num_open: int = 0
    most_open: int = 0  # connections at the same time
    url: str = ""
    stopped: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, request: Request) -> Answer:
        """What an honest server says."""
        content = self.files.get(request.path)
        if content is None:
            return Answer(404, {"Content-Length": "0"}, b"")
        tag = f'"{request.path}-{self.tags.get(request.path, 0)}"'
        headers = {"ETag": tag} if self.has_tags else {}
        if self.knows_if_match and request.headers.get("if-match", tag) != tag:
            return Answer(412, {**headers, "Content-Length": "0"}, b"")
        asked = request.headers.get("range")
        if asked is None:
            return Answer(200, {**headers, "Content-Length": str(len(content))}, content)
        first, last = (int(part) for part in asked.removeprefix("bytes=").split("-"))
        last = min(last, len(content) - 1)
        if first > last:
            headers |= {"Content-Range": f"bytes */{len(content)}", "Content-Length": "0"}
            return Answer(416, headers, b"")
        body = content[first : last + 1]
        headers |= {"Content-Range": f"bytes {first}-{last}/{len(content)}"}
        return Answer(206, {**headers, "Content-Length": str(len(body))}, body)

    def serve(self, client: socket.socket) -> None:
        """Answer the requests of one connection."""
        # Head and body leave in two pieces: the second would wait 40 ms for the client's word.
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with client.makefile("rb") as lines:
            while (first := lines.readline()).strip():
                method, path, _ = first.decode().split()
                headers: dict[str, str] = {}
                while line := lines.readline().strip():
                    key, _, value = line.decode().partition(":")
                    headers[key.lower()] = value.strip()
                with self.lock:
                    number = len(self.requests)
                    request = Request(number, method, path[1:].partition("?")[0], headers)
                    self.requests.append(request)
                    fault = self.plan(request)
                    self.num_faults += fault is not None
                self.stopped.wait(self.seconds_per_answer)
                connection = Connection(client, self, request)
                answer = self.answer(request)
                if fault is not None:
                    fault(connection, answer, random.Random(f"{self.seed}/{number}"))
                else:
                    connection.head(answer.status, answer.headers)
                    client.sendall(b"" if method == "HEAD" else answer.body)


@contextmanager
def serving(server: FaultServer, tls: ssl.SSLContext | None = None) -> Iterator[FaultServer]:
    """Run a server in threads; `server.url` is its root. `tls`: for HTTPS."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with server.lock:
                server.num_open += 1
                server.most_open = max(server.most_open, server.num_open)
            try:
                if tls is None:
                    server.serve(self.request)
                else:
                    with tls.wrap_socket(self.request, server_side=True) as client:
                        server.serve(client)
            except (ConnectionError, TimeoutError, ssl.SSLError):
                return  # the client or a fault ended it
            finally:
                with server.lock:
                    server.num_open -= 1

    class Listener(socketserver.ThreadingTCPServer):
        daemon_threads = True
        allow_reuse_address = True
        request_queue_size = 128

        def shutdown_request(self, request: socket.socket) -> None:  # type: ignore[override]
            self.close_request(request)  # at once, so that a reset stays one

    with Listener(("127.0.0.1", 0), Handler) as listener:
        thread = threading.Thread(target=listener.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        server.url = f"http{'s' if tls else ''}://127.0.0.1:{listener.server_address[1]}"
        try:
            yield server
        finally:
            server.stopped.set()
            listener.shutdown()
            thread.join()
