"""The same command resumes a run, bit for bit, after kills, stops and damage."""

import functools
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from pipeline.checkpoints.folder import list_checkpoints, read_state, verify_checkpoint
from pipeline.models.autoencoder import tensors_sha256
from tests.distributed.in_turn import words
from tests.distributed.models import MODELS
from tests.processes import ROOT, Processes, argv_of, env_of

WORKER = ROOT / "tests/distributed/in_turn.py"
NUM_STEPS = 20
STEPS = {"burgess": NUM_STEPS, "resnet-mini": 8}
NUM_TRIALS = 6
# Strategy, processes, accumulation.
WAYS = [("ddp", number, parts) for number in (1, 2, 3) for parts in (1, 2)]
WAYS += [(f"zero{n}", number, parts) for n in (1, 2, 3) for number in (2, 3) for parts in (1, 2)]
# A size, accumulation, and the stage that shards most; all others, and more trials, are soak.
IN_TEST_ALL = {("ddp", 3, 2), ("zero3", 2, 1)}


def write_config(folder: Path, data: Path, accumulation: int = 1) -> Path:
    """A denoising VAE with everything that has a state: noise, average, moments, schedules.

    Sigma is learned, and weight decay makes two parameter groups.
    """
    path = folder / "config.yaml"
    path.write_text(
        f"run_dir: {folder / 'run'}\n"
        f"data: {{path: {data}, decode: {{kind: image, size: 32, channels: 3}}}}\n"
        "model:\n"
        "  bottleneck: {kind: gaussian, size: 8}\n"
        "  likelihood: {kind: gaussian, sigma: learned}\n"
        "corruptions: [{kind: gaussian_noise}, {kind: masking}]\n"
        "objective: {regularisers: [{kind: kl, weight: {kind: linear, over_samples: 200}}]}\n"
        "optimizer: {learning_rate: {warmup_samples: 60}, weight_decay: 0.01, max_grad_norm: 50}\n"
        "batch_size: 12\n"
        f"accumulation: {accumulation}\n"
        f"num_steps: {NUM_STEPS}\n"
        "evaluation: {every_steps: 7}\n"
        "checkpoint: {every_steps: 3}\n"
        "monitor: {log_every_steps: 1, num_images: 0, wandb: {mode: disabled}}\n"
    )
    return path


def outcome(run: Path) -> dict:
    path = run / "outcome.json"
    return json.loads(path.read_bytes()) if path.exists() else {"status": None}


def newest_step(run: Path) -> int:
    newest = next(iter(list_checkpoints(run / "checkpoints")), None)
    return read_state(newest).step if newest else 0


def result_of(run: Path, num_steps: int = NUM_STEPS) -> dict:
    """What must be equal in two runs: their last checkpoint and their records."""
    assert outcome(run) == {"status": "done", "exit_code": 0, "step": num_steps, "message": ""}
    path = run / "checkpoints" / f"step-{num_steps}"
    verify_checkpoint(path)
    tensors = {file.name: tensors_sha256(load_file(file)) for file in path.glob("*.safetensors")}
    assert tensors.keys() == {"model.safetensors", "ema.safetensors", "optimizer.safetensors"}
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    # A stop may come between a step and its evaluation, which the next start makes up for.
    records.sort(key=lambda record: (record["step"], "train/loss" in record))
    names = ("step", "train/loss", "optim/grad_norm", "eval/loss", "eval_ema/loss")
    logged = [[record.get(name) for name in names] for record in records]
    steps = [record["step"] for record in records if "train/loss" in record]
    assert steps == list(range(1, num_steps + 1))
    return {"state": (path / "state.json").read_text(), "logged": logged} | tensors


def jobs_of(folder: Path, data: Path, accumulation: int, models: Iterable[str]) -> list[str]:
    """Write a config for each model; return the command line that trains one after the other."""
    jobs: list[list[object]] = []
    for model in models:
        (folder / model).mkdir()
        config = write_config(folder / model, data, accumulation)
        jobs.append(["train", config, f"num_steps={STEPS[model]}", *MODELS[model]])
    return words(*jobs)


@pytest.fixture(scope="module")
def uninterrupted(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable:
    """The folder of uninterrupted runs with so many processes: `MODEL/run`."""

    @functools.cache
    def run(
        num_processes: int,
        strategy: str = "ddp",
        accumulation: int = 1,
        models: tuple[str, ...] = ("burgess",),
    ) -> Path:
        folder = tmp_path_factory.mktemp(f"uninterrupted-{strategy}-{num_processes}-{accumulation}")
        argv = argv_of(WORKER, num_processes, strategy)
        argv += jobs_of(folder, tiny_shards, accumulation, models)
        started = Processes(argv, folder / "log", env=env_of(strategy), cwd=ROOT, forked=True)
        result = started.wait(600)
        assert result.code == 0, result.output
        return folder

    return run


def kill_after_a_step(running: Processes, step: int, num_steps: int, delay: float) -> None:
    running.wait_for(f"step {step}/{num_steps} ", timeout=180)
    time.sleep(delay)
    running.kill()


def kill_during_a_save(running: Processes, run: Path, file: str, num_steps: int) -> None:
    """Kill as soon as `file` of an unpublished checkpoint exists; check that it remains.

    There is a published one as well, from which the run goes on.
    """
    running.wait_for(f"step {newest_step(run) + 1}/{num_steps} ", timeout=180)
    ranks = running.ranks()
    checkpoints = run / "checkpoints"
    while not (list_checkpoints(checkpoints) and any(checkpoints.glob(f"step-*.tmp-*/{file}"))):
        assert running.running, running.output
    for rank in ranks:
        rank.kill()
    running.kill()
    assert any(checkpoints.glob("step-*.tmp-*"))


def marks_of(how: tuple[str, int, int], trial: int) -> list[pytest.MarkDecorator]:
    """Marks of a trial of one of WAYS."""
    marks = [pytest.mark.deepspeed] if how[0] != "ddp" else []
    return marks if trial == 0 and how in IN_TEST_ALL else [*marks, pytest.mark.soak]


@pytest.mark.fault
@pytest.mark.distributed
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("strategy", "num_processes", "accumulation", "trial"),
    [pytest.param(*how, n, marks=marks_of(how, n)) for n in range(NUM_TRIALS) for how in WAYS],
)
def test_killed_twice_a_run_ends_bit_for_bit_as_if_nothing_had_been(
    tmp_path: Path,
    tiny_shards: Path,
    start_processes: Callable,
    uninterrupted: Callable,
    strategy: str,
    num_processes: int,
    accumulation: int,
    trial: int,
):
    """Once after a random step, once while it writes a checkpoint; both models in turn."""
    chance = random.Random(f"{strategy}/{num_processes}/{accumulation}/{trial}")
    jobs = jobs_of(tmp_path, tiny_shards, accumulation, MODELS)
    start = functools.partial(start_processes, WORKER, num_processes, *jobs, strategy=strategy)
    for model, num_steps in STEPS.items():
        run = tmp_path / model / "run"
        if model == "burgess" or trial > 0:  # the other kill of resnet-mini is soak
            step, delay = chance.randint(1, num_steps // 2), chance.uniform(0, 0.05)
            kill_after_a_step(start(), step, num_steps, delay)
            assert outcome(run)["status"] == "running"
        file = chance.choice(["state.json", "model.safetensors", "optimizer.safetensors"])
        kill_during_a_save(start(), run, file, num_steps)
        assert outcome(run)["status"] == "running"
        for path in list_checkpoints(run / "checkpoints"):
            verify_checkpoint(path)

    ended = start().wait(600)
    assert ended.code == 0, ended.output
    expected = uninterrupted(num_processes, strategy, accumulation, tuple(MODELS))
    for model, num_steps in STEPS.items():
        run = tmp_path / model / "run"
        assert not any((run / "checkpoints").glob("*.tmp-*"))
        assert result_of(run, num_steps) == result_of(expected / model / "run", num_steps)


@pytest.mark.fault
@pytest.mark.distributed
def test_a_damaged_newest_checkpoint_is_set_aside_and_costs_steps_only(
    tmp_path: Path, tiny_shards: Path, run_processes: Callable, uninterrupted: Callable
):
    config, run = write_config(tmp_path, tiny_shards), tmp_path / "run"
    shutil.copytree(uninterrupted(2) / "burgess/run", run)
    damaged = run / "checkpoints" / f"step-{NUM_STEPS}"
    content = bytearray((damaged / "ema.safetensors").read_bytes())
    content[len(content) // 2] ^= 1
    (damaged / "ema.safetensors").write_bytes(content)

    result = run_processes("pipeline.train", 2, config)
    assert result.code == 0, result.output
    warning = f"warning: the checkpoint {damaged} is damaged (ema.safetensors does not have"
    assert result.output.count(warning) == 1
    assert len(list(damaged.parent.glob(f"{damaged.name}.corrupt-*"))) == 1
    assert "step 19/20 " in result.output
    assert "step 18/20 " not in result.output
    assert result_of(run) == result_of(uninterrupted(2) / "burgess/run")


@pytest.mark.fault
def test_stop_file_sigterm_and_ctrl_c_stop_between_steps_and_lose_nothing(
    tmp_path: Path, tiny_shards: Path, start_processes: Callable, uninterrupted: Callable
):
    """Each of them in turn stops the same run; without a launcher the exit code is ours."""
    config, run = write_config(tmp_path, tiny_shards), tmp_path / "run"

    def touch_stop(running: Processes) -> None:
        while outcome(run)["status"] != "running":
            assert running.running, running.output
        (run / "STOP").touch()

    def send(number: signal.Signals, running: Processes) -> None:
        running.wait_for(f"step {newest_step(run) + 3}/{NUM_STEPS} ")
        os.kill(running.pid, number)

    seen = []
    for stop, reason in (
        (touch_stop, f"the file {run / 'STOP'}"),
        (functools.partial(send, signal.SIGTERM), "signal SIGTERM"),
        (functools.partial(send, signal.SIGINT), "signal SIGINT"),
    ):
        running = start_processes("pipeline.train", None, config)
        stop(running)
        stopped = running.wait()
        assert stopped.code == 3, stopped.output
        assert "the same command resumes" in stopped.output
        seen.append(newest_step(run))
        message = f"stopped by {reason}"
        expected = {"status": "preempted", "exit_code": 3, "step": seen[-1], "message": message}
        assert outcome(run) == expected
    # The file was there early: perhaps before the first step.
    assert 0 <= seen[0] < seen[1] < seen[2] < NUM_STEPS

    ended = start_processes("pipeline.train", None, config).wait()
    assert ended.code == 0, ended.output
    assert result_of(run) == result_of(uninterrupted(1) / "burgess/run")


@pytest.mark.distributed
def test_a_signal_to_one_of_two_processes_stops_both_at_the_same_step(
    tmp_path: Path, tiny_shards: Path, start_processes: Callable, uninterrupted: Callable
):
    config, run = write_config(tmp_path, tiny_shards), tmp_path / "run"
    running = start_processes("pipeline.train", 2, config)
    running.wait_for(f"step 5/{NUM_STEPS} ")
    ranks = running.ranks()
    ranks[1].send_signal(signal.SIGTERM)
    stopped = running.wait()
    assert stopped.code != 0, stopped.output  # the launcher's own; ours is in outcome.json
    assert not any(psutil.pid_exists(rank.pid) for rank in ranks)
    ended = outcome(run)
    assert (ended["status"], ended["exit_code"]) == ("preempted", 3)
    assert ended["message"] == "stopped by signal SIGTERM"
    assert 5 <= ended["step"] == newest_step(run) < NUM_STEPS

    resumed = start_processes("pipeline.train", 2, config).wait()
    assert resumed.code == 0, resumed.output
    assert result_of(run) == result_of(uninterrupted(2) / "burgess/run")
