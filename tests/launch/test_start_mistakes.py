"""Wrong starts end soon, with a sentence and without a trace: never as one process that is alone.

Real processes and a real mistake each: nothing of the pipeline is replaced.
"""

import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.launch.runs import free_ports, write_config
from tests.processes import ROOT, Processes, Result

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(180)]
SECONDS = 20.0  # within which a mistake must be reported
ACCELERATE = ("-m", "accelerate.commands.launch")
TOPOLOGIES = "configs/accelerate"
HERE = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "{free}"}
NOT_TOLD = {"ACCELERATE_USE_CPU": "false"}  # to stay on the CPU


@dataclass(frozen=True)
class Start:
    """How training is started, and the sentence that it must end with.

    In words and values, {free} is a free port, {taken} one on which somebody listens, {folder} a
    folder of the test's.
    """

    message: str
    launcher: tuple[str, ...] = ()  # words before `-m pipeline.train`
    overrides: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)
    topology: str | None = None  # text of {folder}/topology.yaml
    deepspeed: dict | None = None  # content of {folder}/deepspeed.json


MISTAKES = {
    "world size alone": Start(
        "WORLD_SIZE announces 2 processes, but RANK, MASTER_ADDR, MASTER_PORT is not set",
        env={"WORLD_SIZE": "2"},
    ),
    "world size left over": Start(
        "WORLD_SIZE announces 4 processes, but RANK, MASTER_ADDR, MASTER_PORT is not set",
        launcher=(*ACCELERATE, "--config_file", f"{TOPOLOGIES}/single-cpu.yaml"),
        env={"WORLD_SIZE": "4"},
    ),
    "world size no number": Start(
        "WORLD_SIZE is 'two', which is no number", env={"WORLD_SIZE": "two"}
    ),
    "rank outside": Start(
        "RANK is 2, but WORLD_SIZE announces 2 processes, with ranks from 0 to 1",
        env={"WORLD_SIZE": "2", "RANK": "2", **HERE},
    ),
    "the other processes do not start": Start(
        "WORLD_SIZE announces 2 processes, of which this is process 0, but after 8 s they have "
        "not all come to 127.0.0.1:{free}",
        env={"WORLD_SIZE": "2", "RANK": "0", **HERE},
    ),
    "a stranger listens": Start(
        "WORLD_SIZE announces 2 processes, of which this is process 1, but",
        env={"WORLD_SIZE": "2", "RANK": "1", **HERE, "MASTER_PORT": "{taken}"},
    ),
    "one process where two are asked for": Start(
        "accelerate was told where several processes meet (MASTER_ADDR), but has started only this",
        launcher=(*ACCELERATE, "--cpu", "--num_processes", "2"),
    ),
    "port in use": Start(
        "it cannot meet the others at 127.0.0.1:{taken} (MASTER_ADDR, MASTER_PORT): The server "
        "socket has failed to listen",
        env={"WORLD_SIZE": "2", "RANK": "0", **HERE, "MASTER_PORT": "{taken}"},
    ),
    "port in use, several machines": Start(  # accelerate's own words
        "Tried to launch distributed communication on port `{taken}`, but another process is",
        launcher=(
            *(*ACCELERATE, "--config_file", f"{TOPOLOGIES}/multi-node.yaml"),
            *("--main_process_ip", "127.0.0.1", "--main_process_port", "{taken}"),
        ),
    ),
    "no GPU where one is asked for": Start(
        "--device gpu (LATENTMILL_DEVICE), but PyTorch",
        env={"LATENTMILL_DEVICE": "gpu", "CUDA_VISIBLE_DEVICES": ""},
    ),
    "fp16 in the config": Start(
        "fp16 is not supported",
        launcher=(*ACCELERATE, "--config_file", f"{TOPOLOGIES}/single-cpu.yaml"),
        overrides=("precision=fp16",),
    ),
    "fp16 in the environment": Start(
        "accelerate is told to use mixed precision 'fp16'",
        env={"ACCELERATE_MIXED_PRECISION": "fp16"},
    ),
    "fp16 in the topology": Start(
        "accelerate is told to use mixed precision 'fp16'",
        launcher=(*ACCELERATE, "--config_file", "{folder}/topology.yaml"),
        topology="{distributed_type: MULTI_GPU, num_processes: 2, mixed_precision: fp16}",
    ),
    "more ranks than samples": Start(
        "batch_size 1 is not divisible by 2 processes x accumulation 1 = 2. Set batch_size to 2",
        launcher=(*ACCELERATE, "--config_file", f"{TOPOLOGIES}/cpu-ddp.yaml"),
        overrides=("batch_size=1",),
    ),
}
OF_DEEPSPEED = {
    "fp16 in a topology of DeepSpeed": Start(
        "accelerate is told to use mixed precision 'fp16'",
        launcher=(*ACCELERATE, "--config_file", "{folder}/topology.yaml"),
        env=NOT_TOLD,
        topology="{distributed_type: DEEPSPEED, num_processes: 2, mixed_precision: fp16, "
        "deepspeed_config: {deepspeed_config_file: configs/deepspeed/zero2.json}}",
    ),
    "fp16 in DeepSpeed's own settings": Start(
        "/deepspeed.json enables fp16, but the run's config decides the precision",
        launcher=(*ACCELERATE, "--config_file", "{folder}/topology.yaml"),
        env=NOT_TOLD,
        topology="{distributed_type: DEEPSPEED, num_processes: 2, "
        "deepspeed_config: {deepspeed_config_file: {folder}/deepspeed.json}}",
        deepspeed={"fp16": {"enabled": True}, "zero_optimization": {"stage": 2}},
    ),
    "kept on the CPU": Start(
        "ACCELERATE_USE_CPU is set, so accelerate would leave out DeepSpeed",
        launcher=(*ACCELERATE, "--config_file", f"{TOPOLOGIES}/zero2.yaml"),
    ),
}


@pytest.fixture
def taken() -> Iterator[int]:
    """A port of this machine on which somebody listens who never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def run(tmp_path: Path, tiny_shards: Path, taken: int) -> Iterator[Callable[..., Result]]:
    """Start training as a `Start` says, to its end; another Python than ours may be named."""
    config = write_config(tmp_path, tiny_shards, 100)
    values = {"taken": str(taken), "free": str(free_ports(1)[0]), "folder": str(tmp_path)}

    def filled(text: str) -> str:
        for name, value in values.items():
            text = text.replace(f"{{{name}}}", value)
        return text

    with ExitStack() as stack:

        def to_the_end(
            start: Start, python: str = sys.executable, *, forked: bool = True
        ) -> Result:
            if start.topology is not None:
                (tmp_path / "topology.yaml").write_text(filled(start.topology))
            if start.deepspeed is not None:
                (tmp_path / "deepspeed.json").write_text(json.dumps(start.deepspeed))
            launcher = map(filled, start.launcher)
            argv = [python, *launcher, "-m", "pipeline.train", str(config), *start.overrides]
            env = {name: filled(value) for name, value in start.env.items()}
            log, forked = tmp_path / "log", forked and python == sys.executable
            processes = Processes(argv, log, env=env, cwd=ROOT, forked=forked)
            stack.callback(lambda: processes.running and processes.kill())
            result = processes.wait(120)
            assert filled(start.message) in result.output
            return result

        yield to_the_end


def check_refused(run: Callable[..., Result], start: Start, folder: Path, **options: str) -> None:
    began = time.monotonic()
    result = run(start, **options)
    seconds = time.monotonic() - began
    print(f"reported after {seconds:.1f} s")
    assert result.code != 0
    assert seconds < SECONDS
    assert not (folder / "run").exists()


@pytest.mark.parametrize("start", MISTAKES.values(), ids=MISTAKES)
def test_a_wrong_start_is_reported_soon_and_leaves_nothing(
    run: Callable[..., Result], start: Start, tmp_path: Path
):
    check_refused(run, start, tmp_path)


@pytest.mark.deepspeed
@pytest.mark.parametrize("start", OF_DEEPSPEED.values(), ids=OF_DEEPSPEED)
def test_a_wrong_start_of_deepspeed_is_reported_soon_and_leaves_nothing(
    run: Callable[..., Result], start: Start, tmp_path: Path
):
    check_refused(run, start, tmp_path)


@pytest.mark.deepspeed
@pytest.mark.parametrize(
    ("absent", "message"),
    [
        ("deepspeed", "DeepSpeed is not installed"),  # accelerate's own words
        ("transformers", "DeepSpeed, which cannot be imported (No module named 'transformers')"),
    ],
)
def test_without_what_deepspeed_needs_it_says_what_to_install(
    run: Callable[..., Result], tmp_path: Path, absent: str, message: str
):
    """Under the Python below ours, with all of our packages but one."""
    packages = tmp_path / "packages"
    packages.mkdir()
    for entry in Path(pytest.__file__).parents[1].iterdir():
        if entry.name != absent and not entry.name.startswith(f"{absent}-"):
            (packages / entry.name).symlink_to(entry)
    python = Path(sys.base_prefix) / "bin" / f"python{sys.version_info[0]}.{sys.version_info[1]}"
    start = Start(
        message,
        launcher=(*ACCELERATE, "--config_file", f"{TOPOLOGIES}/zero2.yaml"),
        env=NOT_TOLD | {"PYTHONPATH": f"{ROOT}{os.pathsep}{packages}"},
    )
    check_refused(run, start, tmp_path, python=str(python))


def num_processes(run_dir: Path) -> int:
    """How many processes trained, by their last checkpoint."""
    [state] = (run_dir / "checkpoints").glob("step-2/state.json")
    return json.loads(state.read_text())["world"]


def test_with_its_port_in_use_and_without_use_cpu_two_train_as_two(
    run: Callable[..., Result], tmp_path: Path
):
    """accelerate takes another port, and says so; without GPUs we find the CPU ourselves."""
    words = ("--multi_gpu", "--num_processes", "2", "--main_process_port", "{taken}")
    start = Start(
        "Port `{taken}` is already in use",
        launcher=(*ACCELERATE, *words),
        overrides=("num_steps=2",),
        env=NOT_TOLD,
    )
    result = run(start)
    assert result.code == 0, result.output
    assert num_processes(tmp_path / "run") == 2


@pytest.mark.deepspeed
def test_on_cpus_deepspeed_trains_without_a_compiler(run: Callable[..., Result], tmp_path: Path):
    start = Start(
        "done at step 2",
        launcher=(*ACCELERATE, "--config_file", f"{TOPOLOGIES}/zero2.yaml"),
        overrides=("num_steps=2",),
        env=NOT_TOLD | {"PATH": str(tmp_path), "TORCH_EXTENSIONS_DIR": str(tmp_path / "built")},
    )
    result = run(start, forked=False)
    assert result.code == 0, result.output
    assert num_processes(tmp_path / "run") == 2
    assert not (tmp_path / "built").exists()


def test_the_message_is_not_lost_where_the_main_process_comes_last(
    run_processes: Callable[..., Result], tmp_path: Path
):
    """torchrun ends all as soon as one has ended: here that would be before the main one spoke."""
    script = tmp_path / "late.py"
    script.write_text(
        "import os, sys, time\n"
        "from pipeline.train import main\n"
        "time.sleep(3 if os.environ['RANK'] == '0' else 0)\n"
        "sys.exit(main(['no.yaml']))\n"
    )
    result = run_processes(script, 2)
    assert result.code != 0
    assert result.output.count("error: ") == 1
    assert "no.yaml" in result.output
