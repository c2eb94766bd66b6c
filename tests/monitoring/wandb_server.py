"""A small server of W&B, which the real wandb logs in to, writes runs to and resumes them from.

It speaks as much of W&B's GraphQL and file stream as a run needs, and keeps the lines of history.
"""

import gzip
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Row = dict[str, Any]


class WandbServer(ThreadingHTTPServer):
    """What the runs of one account have sent, by their ids."""

    daemon_threads = True
    takes_keys = True
    takes_runs = True
    refuses_history = False

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.runs: dict[str, Row] = {}  # what UpsertBucket said
        self.lines: dict[str, list[Row]] = {}  # of history
        self.exit_codes: dict[str, int] = {}

    def handle_error(self, *_: Any) -> None:
        """A client went away."""

    def answer(self, operation: str, given: Row) -> Row:
        """Answer a query or mutation."""
        account = {"id": "u", "entity": "team", "username": "u", "teams": {"edges": []}}
        name, entity = given.get("name") or "", {"id": "e", "name": "team"}
        project = {"id": "p", "name": given.get("project"), "entity": entity}
        if operation == "Viewer":
            return {"viewer": account if self.takes_keys else None}
        if operation == "RunResumeStatus":
            return {
                "model": {**project, "bucket": self.bucket(name) if name in self.runs else None}
            }
        if operation == "UpsertBucket" and self.takes_runs:
            inserted = name not in self.runs
            self.runs[name] = self.runs.get(name, {}) | {k: v for k, v in given.items() if v}
            bucket = {**self.bucket(name), "project": project, "sweepName": given.get("sweep")}
            return {"upsertBucket": {"bucket": bucket, "inserted": inserted}}
        if operation == "CreateRunFiles":
            files = [{"name": n, "uploadUrl": f"{self.url}/file"} for n in given["files"]]
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
        return {}

    def bucket(self, name: str) -> Row:
        """A run as W&B describes it."""
        lines, run = self.lines.get(name, []), self.runs[name]
        return {
            "id": "b",
            "name": name,
            "displayName": run.get("displayName"),
            "tags": [],
            "config": run.get("config", "{}"),
            "summaryMetrics": "{}",
            "notes": "",
            "historyLineCount": len(lines),
            "historyTail": json.dumps([*map(dump, lines[-1:])]),
            "logLineCount": 0,
            "eventsLineCount": 0,
            "eventsTail": "[]",
            "wandbConfig": '{"t": 1}',
        }

    def receive(self, path: str, content: Row) -> None:
        """Keep a part of a run's history, which begins at an offset in lines."""
        name = path.split("/")[-2]
        part = content.get("files", {}).get("wandb-history.jsonl")
        if part is not None:
            kept = self.lines.setdefault(name, [])
            kept[part["offset"] :] = [json.loads(line) for line in part["content"]]
        if content.get("complete"):
            self.exit_codes[name] = content["exitcode"]

    def steps(self, name: str) -> list[int]:
        """The steps of a run's history, as they came."""
        return [line["_step"] for line in self.lines.get(name, [])]


class Handler(BaseHTTPRequestHandler):
    """Passes requests on to the server."""

    protocol_version = "HTTP/1.1"
    server: WandbServer

    def do_POST(self) -> None:
        """Answer GraphQL; keep the file stream; ignore telemetry."""
        data = self.body()
        if self.path.endswith("/file_stream") and self.server.refuses_history:
            self.close_connection = True
            return
        if self.path.endswith("/file_stream"):
            self.server.receive(self.path, json.loads(data))
        query = json.loads(data) if self.path == "/graphql" else {}
        answer = self.server.answer(query.get("operationName", ""), query.get("variables") or {})
        problem = [{"message": "user is not logged in"}]
        is_refused = bool(query) and not any(answer.values())
        self.send({"errors": problem} if is_refused else {"data": answer})

    def do_PUT(self) -> None:
        """Take a file."""
        self.body()
        self.send({})

    def body(self) -> bytes:
        """The request's content."""
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(data) if self.headers.get("Content-Encoding") == "gzip" else data

    def send(self, content: Row) -> None:
        """Answer with JSON."""
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Print nothing."""


def dump(line: Row) -> str:
    """A line of history as W&B keeps it."""
    return json.dumps(line)


@contextmanager
def serving(server: WandbServer) -> Iterator[WandbServer]:
    """Serve until the end of the block."""
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
