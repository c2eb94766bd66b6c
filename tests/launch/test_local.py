"""The local launcher: its command line, and runs of a stand-in trainer with real processes."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from launch import local
from launch.__main__ import main
from launch.job import Job, JobError
from tests.launch.runs import outcome, write_config
from tests.processes import ROOT, Processes, Result

# What a trainer does as far as a launcher can see: says it is ready, waits for a signal on every
# rank, and writes outcome.json on rank 0.
TRAINER = """
import json, os, signal, sys, time
from pathlib import Path
from accelerate import Accelerator

state = Accelerator()
received = []
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: received.append(number))
run_dir, code = Path(sys.argv[2].partition("=")[2]), int(sys.argv[3].partition("=")[2])
print(f"rank {state.process_index} of {state.num_processes} ready", flush=True)
limit = time.monotonic() + 60
while code == 3 and not received and time.monotonic() < limit:
    time.sleep(0.02)
print(f"rank {state.process_index} got {received}", flush=True)
if state.is_main_process:
    run_dir.mkdir(exist_ok=True)
    (run_dir / "outcome.json").write_text(json.dumps({"exit_code": code}))
state.end_training()
sys.exit(code)
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "vae.yaml"
    path.write_text("run_dir: runs/vae\nseed: 1\n")
    return path


@pytest.fixture
def trainer(tmp_path: Path, config: Path) -> dict[str, str]:
    """The environment in which `-m stand_in` finds the stand-in trainer."""
    (tmp_path / "stand_in.py").write_text(textwrap.dedent(TRAINER))
    return {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "single-cpu.yaml --num_processes 1"),
        ({"num_processes": 2}, "cpu-ddp.yaml --num_processes 2"),
        ({"num_processes": 8, "device": "gpu"}, "gpu-ddp.yaml --num_processes 8"),
        ({"num_processes": 2, "topology": Path("pyproject.toml")}, "pyproject.toml --num_pro"),
    ],
)
def test_command_names_topology_and_processes(config: Path, options: dict, expected: str):
    job = Job(config=config, overrides=("a.b=c d",), **options)
    command = local.command(job)
    assert expected in str(command)
    assert command.argv[-4:] == ("-m", "pipeline.train", str(config), "a.b=c d")
    assert command.argv[:3] == (sys.executable, "-m", "accelerate.commands.launch")
    assert str(command).endswith("'a.b=c d'")
    assert command.env["OMP_NUM_THREADS"] == "1"
    assert ("ACCELERATE_USE_CPU" in command.env) == (options.get("device") != "gpu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_processes": 0}, "--processes must be at least 1, not 0"),
        ({"num_threads": 0}, "--threads must be at least 1, not 0"),
        ({"topology": Path("no.yaml")}, "no.yaml does not exist"),
        ({"config": Path("no.yaml")}, "no.yaml does not exist"),
    ],
)
def test_a_job_that_cannot_start_says_why(config: Path, options: dict, message: str):
    with pytest.raises(JobError, match=message):
        Job(**({"config": config} | options))


def test_run_dir_is_the_last_override_or_the_configs(config: Path):
    assert Job(config=config).run_dir() == Path("runs/vae")
    assert Job(config=config, overrides=("--run_dir=runs/b",)).run_dir() == Path("runs/b")
    config.write_text("{")
    assert Job(config=config).run_dir() is None


def test_without_submit_it_only_prints(config: Path, capsys: pytest.CaptureFixture[str]):
    code = main(["local", "--processes", "2", str(config), "a.b=c", "--model.z=3"])
    assert code == 0
    printed = capsys.readouterr().out
    assert printed.startswith("OMP_NUM_THREADS=1 PYTHONSAFEPATH=1 ACCELERATE_USE_CPU=true ")
    assert printed.endswith(f"-m pipeline.train {config} a.b=c --model.z=3\n")


def test_wrong_use_is_exit_code_2(config: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["local", "no.yaml"]) == 2
    assert capsys.readouterr().err.startswith("error: The config file no.yaml does not exist")
    with pytest.raises(SystemExit, match="2"):
        main(["local", str(config), "--procesess", "3"])
    assert "unrecognized arguments: --procesess 3" in capsys.readouterr().err


def test_printing_a_job_needs_no_torch(config: Path):
    blocked = "import sys; sys.modules['torch'] = sys.modules['pydantic'] = None; "
    code = f"{blocked}from launch.__main__ import main; sys.exit(main(sys.argv[1:]))"
    argv = [sys.executable, "-c", code, "local", str(config)]
    assert subprocess.run(argv, cwd=ROOT, check=False).returncode == 0


def test_an_old_outcome_is_not_this_runs(config: Path, tmp_path: Path):
    (tmp_path / "outcome.json").write_text(json.dumps({"exit_code": 3}))
    job = Job(module="no_such_module", config=config, overrides=(f"run_dir={tmp_path}",))
    assert local.run(job) == 1


@pytest.mark.slow
def test_a_mistake_in_the_config_is_reported_once(
    run_processes: Callable[..., Result], config: Path
):
    result = run_processes("launch", None, "local", "--submit", "--processes", 2, config, "sed=3")
    assert result.code == 2
    assert result.output.count("sed: unknown key (got 3); did you mean 'seed'?") == 1
    assert "Traceback" not in result.output
    assert "torch" not in result.output


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("num_processes", "number"),
    [
        (1, signal.SIGTERM),
        (2, signal.SIGUSR1),
        pytest.param(1, signal.SIGUSR1, marks=pytest.mark.soak),
        pytest.param(2, signal.SIGTERM, marks=pytest.mark.soak),
    ],
)
def test_every_trainer_gets_the_signal_and_the_outcome_comes_back(
    start_processes: Callable[..., Processes],
    config: Path,
    trainer: dict[str, str],
    tmp_path: Path,
    num_processes: int,
    number: signal.Signals,
):
    running = start_processes(
        "launch",
        None,
        *("local", "--submit", "--module", "stand_in", "--processes", num_processes),
        *(config, f"run_dir={tmp_path / 'run'}", "code=3"),
        env=trainer,
    )
    for rank in range(num_processes):
        running.wait_for(f"rank {rank} of {num_processes} ready")
    os.kill(running.pid, number)
    result = running.wait(60)
    assert result.code == 3, result.output
    for rank in range(num_processes):
        assert f"rank {rank} got [{int(number)}" in result.output.replace("Signals.", "")


@pytest.mark.distributed
def test_done_is_exit_code_0(
    run_processes: Callable[..., Result], config: Path, trainer: dict[str, str], tmp_path: Path
):
    result = run_processes(
        "launch",
        None,
        *("local", "--submit", "--module", "stand_in", "--processes", 2),
        *(config, f"run_dir={tmp_path / 'run'}", "code=0"),
        env=trainer,
    )
    assert result.code == 0, result.output
    assert "rank 1 of 2 ready" in result.output


@pytest.mark.distributed
@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_topologies_connect_their_processes(
    run_processes: Callable[..., Result], tmp_path: Path, num_processes: int
):
    script = tmp_path / "all_reduce.py"
    script.write_text(
        textwrap.dedent("""
            import torch
            from accelerate import Accelerator

            accelerator = Accelerator()
            total = accelerator.reduce(torch.tensor([2.0**accelerator.process_index]))
            text = f"{accelerator.process_index}:{total.item():g}:{accelerator.device.type}"
            print(f"sum {text}:{torch.get_num_threads()}", flush=True)
            accelerator.end_training()
        """)
    )
    result = run_processes(script, num_processes)
    assert result.code == 0, result.output
    for rank in range(num_processes):
        assert f"sum {rank}:{2**num_processes - 1}:cpu:1" in result.output


@pytest.mark.distributed
def test_killed_by_sigkill_it_leaves_no_process(
    start_processes: Callable[..., Processes], tiny_shards: Path, tmp_path: Path
):
    """SIGKILL, of which no launcher hears; the trainer saves, as if it had been asked to stop."""
    config = write_config(tmp_path, tiny_shards, 1_000_000)
    running = start_processes("launch", None, "local", "--submit", "--threads", 1, config)
    running.wait_for("step 2/", timeout=120)
    everybody = running.everything()
    assert len(everybody) == 3  # launch, accelerate, trainer
    everybody[0].kill()
    _, left = psutil.wait_procs(everybody, timeout=30)
    assert not left, running.output
    assert outcome(tmp_path / "run")["status"] == "preempted", running.output


@pytest.mark.distributed
def test_training_preempted_and_resumed_by_the_same_command(
    start_processes: Callable[..., Processes], tiny_shards: Path, tmp_path: Path
):
    command = (
        *("local", "--submit", "--processes", 2, ROOT / "configs" / "train" / "vae.yaml"),
        *(f"run_dir={tmp_path / 'run'}", f"data.path={tiny_shards}", "batch_size=8"),
        *("data.decode={kind: image, size: 32, channels: 3}", "monitor.log_every_steps=1"),
        *("evaluation.every_steps=1000", "checkpoint.every_steps=1000"),
        "optimizer.learning_rate.warmup_samples=0",
    )
    running = start_processes("launch", None, *command, "num_steps=100000")
    running.wait_for("step 3/", timeout=120)
    os.kill(running.pid, signal.SIGUSR1)
    preempted = running.wait(90)
    assert preempted.code == 3, preempted.output
    outcome = json.loads((tmp_path / "run" / "outcome.json").read_text())
    assert outcome["status"] == "preempted"

    steps = outcome["step"] + 2
    finished = start_processes("launch", None, *command, f"num_steps={steps}").wait(120)
    assert finished.code == 0, finished.output
    assert f"step {steps}/{steps}" in finished.output
    assert "step 1/" not in finished.output
