"""The image's recipe: its lint, its entrypoint, what it is built from; and, as soak, its steps."""

import io
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import threading
import tomllib
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.processes import ROOT, Processes

BIN = Path(sys.executable).parent
ENTRYPOINT = ROOT / "docker/entrypoint.sh"
# What is in the image or installed into it; tests, benchmarks, figures and hooks stay outside.
SENT = ("latentmill/", "pipeline/", "launch/", "configs/", "examples/")
SENT_FILES = {"pyproject.toml", "setup.py", "constraints.txt", "README.md", "LICENSE"}
SENT_FILES |= {"docker/entrypoint.sh"}
KEPT_OUT = (
    ".venv/lib/python3.11/site-packages/torch.py",
    ".git/config",
    "data/sprites/shard-000000.tar",
    "runs/vae/config.yaml",
    "exports/part.parquet",
    "demo/sprites/shard-000000.tar",
    "wandb/run.wandb",
    "build/lib/pipeline/train.py",
    "pipeline/__pycache__/train.cpython-311.pyc",
    "pipeline/data/__pycache__/order.cpython-311.pyc",
    "latentmill.egg-info/PKG-INFO",
    "pip.conf",
    ".env",
)


def tool(name: str) -> str:
    """A linter of the virtual environment, or of the machine."""
    found = shutil.which(name, path=f"{BIN}:{os.environ['PATH']}")
    if found is None:
        pytest.skip(f"{name} is not installed here")
    return found


def rehearse(*arguments: str, root: Path = ROOT) -> str:
    command = [sys.executable, str(root / "docker/rehearse.py"), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def enter(*arguments: str, path: Path = BIN, **how: Any) -> subprocess.CompletedProcess[str]:
    """Run the entrypoint as an image does, with `path` where the image has its environment."""
    env = os.environ | {"PATH": f"{path}:{os.environ['PATH']}"}
    argv = [str(ENTRYPOINT), *arguments]
    return subprocess.run(argv, env=env, capture_output=True, text=True, check=False, **how)


def plan(target: str) -> list[str]:
    return rehearse("--plan", "--target", target).splitlines()


def test_the_dockerfile_has_no_lint():
    done = subprocess.run(
        [tool("hadolint"), "--no-color", str(ROOT / "docker/Dockerfile")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def test_the_scripts_have_no_lint():
    for script in (ROOT / "docker").glob("*.sh"):
        done = subprocess.run(
            [tool("shellcheck"), str(script)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout


def test_both_targets_run_the_same_steps():
    cpu, gpu = plan("cpu"), plan("gpu")
    assert cpu[0].startswith("FROM debian:bookworm-")
    assert gpu[0].startswith("FROM nvidia/cuda:")
    assert [line.replace("cpu-", "gpu-").replace("AS cpu", "AS gpu") for line in cpu[1:]] == gpu[1:]


def test_the_dependencies_are_those_of_every_extra_but_dev():
    (line,) = [line for line in plan("cpu") if "optional-dependencies" in line]
    code = next(word for word in shlex.split(line) if "optional-dependencies" in word)
    argv = [sys.executable, "-c", code]
    printed = subprocess.run(argv, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    whole = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = {*whole["build-system"]["requires"], *whole["project"]["dependencies"]}
    for name, extra in whole["project"]["optional-dependencies"].items():
        wanted |= set() if name == "dev" else set(extra)
    # The extras name each other; what they contain is listed, and the project is installed later.
    names_another = {one for one in wanted if one.startswith("latentmill[")}
    assert set(printed.splitlines()) == wanted - names_another


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_it_runs_as_a_user_under_tini(target: str):
    users = [line.split()[1] for line in plan(target) if line.startswith("USER ")]
    assert int(users[-1]) > 0  # a number: Kubernetes' runAsNonRoot cannot judge a name
    assert plan(target)[-1] == 'ENTRYPOINT ["tini", "--", "entrypoint.sh"]'


def test_bases_and_build_arguments():
    pinned = rehearse("--plan", "--build-arg", "CPU_BASE=debian:bookworm-20260824-slim@sha256:ab")
    assert pinned.startswith("FROM debian:bookworm-20260824-slim@sha256:ab AS cpu-base\n")
    for target in ("cpu", "gpu"):
        tag = plan(target)[0].split()[1].split(":")[1]
        assert tag not in ("latest", "stable"), tag
        assert any(character.isdigit() for character in tag), tag


def test_the_entrypoint_prints_versions_and_becomes_the_command():
    done = enter("python", "-c", "import os, sys; print(sys.argv[1:], os.getppid())", "a b", "")
    assert done.returncode == 0, done.stderr
    # Its parent is this process: no shell is left between.
    assert done.stdout == f"['a b', ''] {os.getpid()}\n"
    for name in ("python 3.", "torch 2.", "CUDA ", "accelerate ", "deepspeed ", "latentmill 0."):
        assert name in done.stderr


def test_the_entrypoint_without_arguments_shows_the_help():
    done = enter()
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: latentmill ")


def test_the_entrypoint_hands_on_the_exit_code_and_stdin():
    assert enter("cat", input="x").stdout == "x"
    assert enter("bash", "-c", "exit 3").returncode == 3
    missing = enter("no-such-command")
    assert missing.returncode == 127
    assert "no-such-command" in missing.stderr


def test_the_entrypoint_says_what_is_missing(tmp_path: Path):
    venv.create(tmp_path / "bare", with_pip=False)
    done = enter("true", path=tmp_path / "bare/bin")
    assert done.returncode == 0, done.stderr
    assert "torch not installed, CUDA no torch" in done.stderr
    assert "latentmill not installed" in done.stderr


def test_the_entrypoint_imports_nothing_from_where_it_starts(tmp_path: Path):
    for name in ("torch", "platform", "pathlib"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported from the folder')")
    done = enter("true", cwd=tmp_path)
    assert (done.returncode, done.stderr[:7]) == (0, "python ")


def tracked() -> list[str]:
    """The files of the repository, with those that a commit in the making adds or takes away."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    return [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tracked files, with typical untracked files of a working folder."""
    root = tmp_path_factory.mktemp("checkout")
    for name in tracked():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    for name in KEPT_OUT:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("not for an image")
    return root


def test_the_context_is_the_tracked_files_that_the_image_needs(checkout: Path):
    wanted = {name for name in tracked() if name.startswith(SENT)} | SENT_FILES
    assert "pipeline/data/__init__.py" in wanted  # a folder named data that is ours
    assert set(rehearse("--context", root=checkout).splitlines()) == wanted


def test_every_copied_path_is_in_the_context():
    names = rehearse("--context").splitlines()
    copies = [line for line in plan("cpu") if line.startswith("COPY ") and "--from=" not in line]
    assert copies
    for source in [word for line in copies for word in line.split()[1:-1]]:
        assert any(name == source or name.startswith(f"{source}/") for name in names), source


class Daemon(BaseHTTPRequestHandler):
    """As much of Docker's daemon as it takes to be sent a context."""

    protocol_version = "HTTP/1.1"
    received: bytes

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name there
        pass

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Api-Version", "1.41")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_HEAD(self) -> None:
        self._answer(b"")

    def do_GET(self) -> None:
        self._answer(b"OK")

    def do_POST(self) -> None:
        chunks: list[bytes] = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        type(self).received = b"".join(chunks)
        self._answer(b"{}")


@contextmanager
def daemon() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Daemon)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"tcp://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_docker_sends_the_context_that_the_rehearsal_uses(checkout: Path, tmp_path: Path):
    docker = tool("docker")
    with daemon() as host:
        settings = {"DOCKER_HOST": host, "DOCKER_BUILDKIT": "0", "DOCKER_CONFIG": str(tmp_path)}
        subprocess.run(
            [docker, "build", "--quiet", "--file", "docker/Dockerfile", "."],
            cwd=checkout,
            env=os.environ | settings,
            check=True,
            capture_output=True,
        )
    with tarfile.open(fileobj=io.BytesIO(Daemon.received)) as sent:
        names = {member.name for member in sent if member.isfile()}
    # It adds its own two files whatever the rules say, and takes them away again.
    own = {"docker/Dockerfile", ".dockerignore"}
    assert names - own == set(rehearse("--context", root=checkout).splitlines())


@pytest.mark.parametrize(
    "wrong, said",
    [
        ("ADD x /x", "ADD is not one of ARG, COPY"),
        ("FROM debian", "not `FROM image AS name`"),
        ("RUN true \\", "the file ends inside"),
    ],
)
def test_the_rehearsal_refuses_what_it_does_not_know(checkout: Path, wrong: str, said: str):
    dockerfile = checkout / "docker/Dockerfile"
    before = dockerfile.read_text()
    dockerfile.write_text(f"{before}{wrong}\n")
    try:
        with pytest.raises(subprocess.CalledProcessError) as caught:
            rehearse("--plan", root=checkout)
    finally:
        dockerfile.write_text(before)
    assert said in caught.value.stderr
    assert "Traceback" not in caught.value.stderr


LIFE = r"""
set -e
echo "user $(id --user)"
latentmill pack sprites data/sprites --count 2000
launch="latentmill train vae --device cpu monitor.log_every_steps=4"
launch+=" optimizer.learning_rate.warmup_samples=64"
$launch run_dir=runs/compiled compile=true num_steps=8
ACCELERATE_USE_CPU=false accelerate launch --config_file configs/accelerate/zero2.yaml \
    -m pipeline.train configs/train/vae.yaml run_dir=runs/zero2 num_steps=9 \
    monitor.log_every_steps=3 optimizer.learning_rate.warmup_samples=64
exec $launch --processes 2 run_dir=runs/stopped num_steps=1000000
"""


@pytest.mark.soak
def test_rehearsal_of_the_image_and_of_a_container_that_is_stopped(tmp_path: Path):
    """Every RUN step; then packing, a compiled training, ZeRO, and SIGTERM to process 1 of DDP."""
    if os.geteuid() or not shutil.which("debootstrap"):
        pytest.skip("a rehearsal needs root and debootstrap")
    argv = [sys.executable, str(ROOT / "docker/rehearse.py"), "--", "bash", "-c", LIFE]
    container = Processes(argv, tmp_path / "log", env={}, cwd=ROOT)
    try:
        container.wait_for("/1,000,000  loss", timeout=1800)
        (first,) = [one for one in container.everything() if one.name() == "tini"]
        first.terminate()
        psutil.wait_procs([first], timeout=30)
        assert not first.is_running(), container.output
        result = container.wait(timeout=1800)  # 5 GB of small files are removed
    finally:
        container.kill()
    print(result.output)
    assert result.code == 3, result.output
    assert "user 10001" in result.output
    assert "step 8/8 " in result.output
    assert "step 9/9 " in result.output
