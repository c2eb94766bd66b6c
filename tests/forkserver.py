"""Starts commands fast: forks them from a process that has imported the libraries.

On two cores a process of a command spends most of its time on imports of torch, accelerate and
DeepSpeed. Here one process imports them, without our own code, and forks every command:

    client: Command([python, -m, accelerate.commands.launch, ...]) --argv, env, cwd, log--> server
    server --fork--> the command in a session of its own --at its end--> client: the exit code

`accelerate launch` and torchrun run unchanged, but the processes that they start are forks, not new
interpreters. Tests of the launchers themselves use new interpreters: see `Processes`.
"""

import atexit
import gc
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import psutil

ROOT = Path(__file__).parents[1]
LAUNCHER = ["-m", "accelerate.commands.launch"]
LIBRARIES = (
    *("torch", "torch.distributed.run", "accelerate", "accelerate.commands.launch"),
    # Imported by torch and DeepSpeed when a model is first wrapped or trained.
    *("torch.distributed.fsdp", "torch.distributed.tensor", "torch._dynamo", "torch.onnx"),
    *("torch._inductor.compile_fx", "deepspeed.module_inject", "deepspeed.moe", "networkx"),
    *("setuptools", "transformers", "safetensors.torch", "wandb", "webdataset", "sklearn"),
    *("cv2", "PIL.ImageOps", "simplejpeg", "pyarrow.parquet", "fsspec", "pydantic", "yaml"),
)
POLL_SECONDS = 0.01


class Command:
    """A forked command, with the part of the interface of `subprocess.Popen` that tests use."""

    def __init__(self, argv: Sequence[str], log: Path, *, env: Mapping[str, str], cwd: Path):
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(server())
        request = {"argv": [*argv], "log": str(log), "env": dict(env), "cwd": str(cwd)}
        self._connection.sendall(json.dumps(request).encode() + b"\n")
        self._answers = self._connection.makefile("r")
        self.pid = int(self._answers.readline())
        self._code: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code, negative for a signal; raises TimeoutExpired."""
        if self._code is None:
            with selectors.DefaultSelector() as selector:
                selector.register(self._connection, selectors.EVENT_READ)
                if not selector.select(timeout):
                    raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
            self._code = int(self._answers.readline())
            self._answers.close()
            self._connection.close()
        return self._code

    def poll(self) -> int | None:
        """Return the exit code; None while the command runs."""
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None


@cache
def server() -> str:
    """Start the server of this test run, and return the path of its socket."""
    path = f"{mkdtemp(prefix='forkserver-')}/socket"
    env = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "WANDB_SILENT": "true"}
    process = subprocess.Popen([sys.executable, __file__, path], env=env, start_new_session=True)
    atexit.register(lambda: (process.kill(), process.wait()))
    while not Path(path).exists():
        assert process.poll() is None, "the fork server did not start"
        time.sleep(POLL_SECONDS)
    return path


def serve(path: str) -> None:
    """Fork commands until the client's process has ended."""
    parent = os.getppid()
    for name in LIBRARIES:
        import_module(name)
    gc.collect()
    gc.freeze()
    running: dict[int, socket.socket] = {}
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{path}.new")
        listener.listen(16)
        os.rename(f"{path}.new", path)
        listener.settimeout(POLL_SECONDS)
        while os.getppid() == parent:
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                pass
            else:
                connection.settimeout(None)
                with connection.makefile("r") as requests:
                    request = json.loads(requests.readline())
                pid = os.fork()
                if pid == 0:
                    for inherited in (connection, *running.values()):
                        inherited.close()
                    listener.close()
                    become(**request)
                    return
                running[pid] = connection
                connection.sendall(f"{pid}\n".encode())
            for pid, status in ended(running):
                with running.pop(pid) as connection:
                    connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())


def ended(running: Mapping[int, object]) -> list[tuple[int, int]]:
    """Return process ids and statuses of the commands that have ended."""
    found = (os.waitpid(pid, os.WNOHANG) for pid in running)
    return [(pid, status) for pid, status in found if pid]


def become(
    argv: list[str], log: str, env: dict[str, str], cwd: str, errors: str | None = None
) -> None:
    """Turn this process into the command; returns or raises at its end.

    errors: the file for stderr, if not `log`.
    """
    os.setsid()
    sys.executable = argv[0]
    with (
        Path(log).open("ab") as file,
        Path(errors or log).open("ab") as other,
        Path(os.devnull).open("rb") as nothing,
    ):
        for stream, target in enumerate((nothing, file, other)):
            os.dup2(target.fileno(), stream)
    sys.stdout.reconfigure(line_buffering=True)
    sys.stderr.reconfigure(line_buffering=True)
    default_signals()
    own_media_folder()
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    if argv[1:3] == LAUNCHER:
        launch(argv[3:])
    else:
        run_target(argv[1:])


def default_signals() -> None:
    """Set the signal handlers of a new interpreter: a fork keeps its parent's."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def own_media_folder() -> None:
    """Give W&B a staging folder per command: the first command that ends removes its folder."""
    folder = import_module("wandb.sdk.data_types._private").MEDIA_TMP
    folder._finalizer.detach()
    folder.__init__("wandb-media")


def run_target(words: Sequence[str]) -> None:
    """Run `[-u] -m MODULE ...` or `[-u] SCRIPT ...` as the main program."""
    words = [*words[1:]] if words[0] == "-u" else [*words]
    is_module = words[0] == "-m"
    words = words[1:] if is_module else words
    sys.argv = words
    first = str(Path.cwd()) if is_module else str(Path(words[0]).parent)
    sys.path[:] = [first, str(ROOT), *sys.path[1:]]
    if is_module:
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(words[0], run_name="__main__")


def launch(words: Sequence[str]) -> None:
    """Run `accelerate launch`; each process that it starts is a fork."""
    launcher, torchrun = import_module("accelerate.commands.launch"), import_module(LIBRARIES[1])
    elastic_launch = torchrun.elastic_launch

    def forking_launch(config: Any, entrypoint: str) -> Callable[..., Any]:
        del entrypoint  # the interpreter
        config.start_method = "fork"
        return lambda *target: elastic_launch(config=config, entrypoint=run_forked)(target)

    torchrun.elastic_launch = forking_launch
    launcher.simple_launcher = partial(launch_one, launcher.prepare_simple_launcher_cmd_env)
    sys.argv = ["accelerate-launch", *words]
    launcher.main()


def run_forked(words: Sequence[str]) -> None:
    """Run the target as soon as all processes of this launcher have been forked.

    torchrun's store answers connections in a thread. To log the peer's name the thread takes a lock
    of glibc's resolver, and a process that is forked meanwhile never gets that lock: it would hang
    in its first look-up of a name. So nobody connects before the last fork.
    """
    launcher = psutil.Process(os.getppid())
    while len(launcher.children()) < int(os.environ["LOCAL_WORLD_SIZE"]):
        time.sleep(POLL_SECONDS)
    run_rank(words)


def launch_one(prepare: Callable[[Any], tuple[list[str], dict[str, str]]], args: Any) -> None:
    """Run one process, as accelerate's launcher of one process does."""
    command, env = prepare(args)
    pid = os.fork()
    if pid == 0:
        os.environ.update(env)
        run_rank(command[1:])
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code:
        raise subprocess.CalledProcessError(code, command)


def run_rank(words: Sequence[str]) -> None:
    """Run the target and its exit functions, as an interpreter does; return if it succeeded."""
    code: Any = 0
    default_signals()  # torchrun's handlers would raise an exception inside the command
    try:
        run_target(words)
    except SystemExit as error:
        code = error.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:  # noqa: BLE001 - as an interpreter prints any
        sys.excepthook(*sys.exc_info())
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        os._exit(code)


if __name__ == "__main__":
    serve(sys.argv[1])
