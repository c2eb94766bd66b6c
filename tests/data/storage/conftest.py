"""Real servers on 127.0.0.1 that serve shards: nginx, and an S3 by moto."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
import pytest
from s3fs import S3FileSystem

BUCKET = "bucket"
NGINX = """
daemon off; worker_processes 1; pid {folder}/pid; error_log {folder}/error.log;
events {{ worker_connections 256; }}
http {{
    access_log off;
    client_body_temp_path {folder}/t; proxy_temp_path {folder}/t; fastcgi_temp_path {folder}/t;
    uwsgi_temp_path {folder}/t; scgi_temp_path {folder}/t;
    server {{ listen 127.0.0.1:{port}; root {root}; }}
}}
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for_port(port: int, process: subprocess.Popen[bytes], seconds: float = 60) -> None:
    limit = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            assert process.poll() is None, f"{process.args} ended with {process.returncode}"
            assert time.monotonic() < limit, f"{process.args} does not listen"
            time.sleep(0.05)


def stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    process.wait(timeout=10)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers of this machine are spoken to directly, whatever its environment says."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def nginx(tmp_path: Path) -> Iterator[Callable[[Path], str]]:
    """Serve a directory by nginx; the result is its URL."""
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if program is None:
        pytest.skip("nginx is not installed (apt-get install nginx-light)")
    started: list[subprocess.Popen[bytes]] = []

    def serve(root: Path) -> str:
        folder, port = tmp_path / f"nginx-{len(started)}", free_port()
        folder.mkdir()
        # Its workers run as another user unless root's own files are to be read.
        user = "user root;" if os.geteuid() == 0 else ""
        config = folder / "nginx.conf"
        config.write_text(user + NGINX.format(folder=folder, port=port, root=root))
        argv = [program, "-c", str(config), "-e", str(folder / "error.log"), "-p", str(folder)]
        started.append(subprocess.Popen(argv))
        wait_for_port(port, started[-1])
        return f"http://127.0.0.1:{port}"

    yield serve
    for process in started:
        stop(process)


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """A server that speaks S3; credentials and endpoint stand in the environment, as AWS has it."""
    port = free_port()
    argv = [sys.executable, str(Path(__file__).with_name("s3_server.py")), str(port)]
    process = subprocess.Popen(argv, stderr=subprocess.DEVNULL)
    endpoint = f"http://127.0.0.1:{port}"
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_ACCESS_KEY_ID", "testing")
        environment.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
        environment.setenv("AWS_ENDPOINT_URL", endpoint)
        S3FileSystem.clear_instance_cache()
        wait_for_port(port, process)
        boto3.client("s3").create_bucket(Bucket=BUCKET)
        yield endpoint
        S3FileSystem.clear_instance_cache()
    stop(process)


@pytest.fixture
def s3(s3_endpoint: str) -> Callable[[Path, str], str]:
    """Copy a directory's files into the bucket, below a prefix; the result is its URL."""
    client = boto3.client("s3")

    def upload(root: Path, prefix: str) -> str:
        for path in sorted(root.rglob("*")):
            if path.is_file():
                key = f"{prefix}/{path.relative_to(root).as_posix()}"
                client.upload_file(str(path), BUCKET, key)
        return f"s3://{BUCKET}/{prefix}"

    return upload
