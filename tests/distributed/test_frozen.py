"""A fine-tune of the decoder alone: nothing of the encoder moves, under any strategy.

one run, killed again and again: ddp x 2 -> zero3 x 2 -> zero2 x 2 -> zero1 x 3, with weight decay,
gradient checkpointing, clipping and an average
"""

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pipeline.checkpoints.folder import list_checkpoints, read_state, verify_checkpoint
from pipeline.train import main
from pipeline.training.loading import load_run
from tests.checkpoints.test_resume import newest_step
from tests.distributed.test_equivalence import logged
from tests.launch.runs import result_of, write_config

LEGS = (("ddp", 2), ("zero3", 2), ("zero2", 2), ("zero1", 3))
SETTINGS = (
    "freeze=[encoder.*]",
    "model.gradient_checkpointing=true",
    "model.likelihood={kind: gaussian, sigma: learned}",
    "optimizer.weight_decay=0.5",
    "optimizer.max_grad_norm=100",
    "checkpoint.every_steps=3",
)


@pytest.fixture(scope="module")
def trained(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose averaged weights differ from its raw ones; its likelihood learns nothing."""
    folder = tmp_path_factory.mktemp("trained")
    config = write_config(folder, tiny_shards, 4)
    assert main([str(config), "optimizer.learning_rate.warmup_samples=0"]) == 0
    return folder / "run"


def tensors(checkpoint: Path, name: str) -> dict[str, Tensor]:
    return load_file(checkpoint / f"{name}.safetensors")


def check(checkpoint: Path, initial: dict[str, Tensor]) -> None:
    """Raise unless the encoder has its first bytes, and only what is trained has a state."""
    verify_checkpoint(checkpoint)
    model = tensors(checkpoint, "model")
    frozen = {name for name in model if name.startswith("encoder.")}
    assert frozen
    for name in frozen:
        assert model[name].numpy().tobytes() == initial[name].numpy().tobytes(), name
    rest = model.keys() - frozen
    assert tensors(checkpoint, "ema").keys() == rest
    moments = {f"{kind}.{name}" for kind in ("exp_avg", "exp_avg_sq") for name in rest}
    if read_state(checkpoint).step > 0:
        assert tensors(checkpoint, "optimizer").keys() == moments
        assert not [
            name for name in rest & initial.keys() if torch.equal(model[name], initial[name])
        ]


@pytest.mark.deepspeed
@pytest.mark.fault
@pytest.mark.timeout(900)
def test_the_encoders_bytes_survive_training_kills_and_changes_of_strategy(
    tmp_path: Path, tiny_shards: Path, trained: Path, start_processes: Callable
):
    source = Path(shutil.copytree(trained, tmp_path / "source"))
    before = load_run(source)
    initial = {name: value.clone() for name, value in before.model.state_dict().items()}
    config, run = write_config(tmp_path, tiny_shards, 1_000_000), tmp_path / "run"
    settings = (*SETTINGS, f"init_from={source}")
    step = 0
    for number, (strategy, world) in enumerate(LEGS, start=1):
        is_last = number == len(LEGS)
        ends = (f"num_steps={step + 3}",) if is_last else ()
        argv = ("pipeline.train", world, config, *settings, *ends)
        running = start_processes(*argv, strategy=strategy)
        if is_last:
            ended = running.wait()
            assert ended.code == 0, ended.output
        else:
            running.wait_for(f"step {step + 4}/", timeout=180)
            while newest_step(run) <= step:  # a save that is under way
                assert running.running, running.output
                time.sleep(0.02)
            running.kill()
        assert "requires_grad" not in running.output  # torch warns of a half without gradients
        assert ("starts from" in running.output) == (number == 1)
        shutil.rmtree(source, ignore_errors=True)  # no later start reads it
        newest = list_checkpoints(run / "checkpoints")[0]
        assert read_state(newest).step > step
        step = read_state(newest).step
        check(newest, initial)
        origin = {"kind": "run", "sha256": before.weights_sha256}
        assert read_state(newest).init_from == origin
    for weights in ("raw", "ema"):
        after = load_run(run, weights=weights)
        assert after.encoder_sha256 == before.encoder_sha256
        assert after.weights_sha256 != before.weights_sha256

    # The steps of one process that nobody stopped.
    alone = tmp_path / "alone"
    again = (f"init_from={trained}", f"run_dir={alone}", f"num_steps={step}")
    assert main([str(config), *SETTINGS, *again]) == 0
    names = ("train/loss", "optim/grad_norm")
    for found, expected in zip(logged(run, *names), logged(alone, *names), strict=True):
        assert found == pytest.approx(expected, rel=1e-2)


@pytest.mark.soak
@pytest.mark.deepspeed
@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2", "zero3"])
def test_killed_under_one_strategy_it_ends_bit_for_bit(
    tmp_path: Path, tiny_shards: Path, trained: Path, start_processes: Callable, strategy: str
):
    num_steps = 30
    config = write_config(tmp_path, tiny_shards, num_steps)
    results = []
    for name in ("whole", "killed"):
        settings = (*SETTINGS, f"init_from={trained}", f"run_dir={tmp_path / name}")
        argv = ("pipeline.train", 2, config, *settings)
        if name == "killed":
            running = start_processes(*argv, strategy=strategy)
            running.wait_for(f"step 7/{num_steps} ")
            running.kill()
        ended = start_processes(*argv, strategy=strategy).wait()
        assert ended.code == 0, ended.output
        results.append(result_of(tmp_path / name, num_steps))
    assert results[0] == results[1]
