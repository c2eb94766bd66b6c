"""Bad input to a training: one clear paragraph, exit code 2, and no files half-written."""

import ctypes
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import PartialState
from webdataset.writer import TarWriter

from pipeline.data.index import build_index
from pipeline.data.index.splits import SplitSpec
from pipeline.train import main
from tests.processes import CPU_ENV, ROOT, Processes, Result
from tests.shards import png, tiny_image

SPLIT = SplitSpec(fractions={"train": 0.75, "held_out": 0.25})
CONFIG = """
run_dir: {tmp}/run
data: {{path: {shards}, decode: {{kind: image, size: 8}}, threads: 1}}
model: {{backbone: {{kind: mlp, hidden: [4]}}, bottleneck: {{kind: gaussian, size: 2}}}}
batch_size: 8
num_steps: 2
monitor: {{wandb: {{mode: disabled}}}}
"""


@pytest.fixture
def config(tmp_path: Path, tiny_shards: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG.format(tmp=tmp_path, shards=tiny_shards))
    return path


@pytest.fixture
def own_shards(tmp_path: Path, tiny_shards: Path) -> Path:
    """A copy of the shards, to be damaged."""
    return Path(shutil.copytree(tiny_shards, tmp_path / "shards"))


@pytest.fixture
def refused(config: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Start a training that must be refused; return its message."""

    def start(*overrides: object) -> str:
        before = listing(config.parent)
        assert main([str(config), *map(str, overrides)]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.startswith("error: ")
        assert printed.err.endswith("\n")
        assert "\n\n" not in printed.err
        assert "Traceback" not in printed.err
        assert listing(config.parent) == before
        return printed.err

    return start


def listing(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


def test_this_config_is_a_good_one_otherwise(config: Path):
    assert main([str(config)]) == 0
    assert json.loads((config.parent / "run" / "outcome.json").read_text())["status"] == "done"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sed=3", "sed: unknown key (got 3); did you mean 'seed'?"),
        ("data.window_size=3", "data.window_size: unknown key (got 3); did you mean 'window'?"),
        ("model.backbone={kind: burges}", "did you mean 'burgess'?"),
        ("batch_size=eight", "batch_size:"),
        ("num_steps=2.5", "num_steps:"),
        ("seed=-1", "seed:"),
        ("data.max_bad_fraction=1.5", "data.max_bad_fraction:"),
        ("precision=fp8", "precision:"),
    ],
)
def test_a_mistake_in_a_setting(refused: Callable[..., str], override: str, message: str):
    text = refused(override)
    assert "1 problem:" in text
    assert message in text
    assert override.partition("=")[2].strip("{}").split(" ")[-1] in text  # the value


def test_several_mistakes_are_told_at_once(refused: Callable[..., str]):
    text = refused("sed=3", "batch_size=eight", "data.window=0")
    assert "3 problems:" in text
    for name in ("sed", "batch_size", "data.window"):
        assert f"\n  {name}: " in text


def test_a_batch_that_cannot_fit(refused: Callable[..., str]):
    message = refused(
        "model.backbone={kind: resnet, preset: sd}",
        *("data.decode.size=256", "batch_size=4096", "precision=bf16"),
    )
    # 84 million parameters, and 1.6 GB of activations for each picture.
    assert "a step does not fit: by an estimate a process needs 6," in message
    assert "(weights, gradients and moments 1.7 GB, activations of 4096 images 6," in message
    assert "set accumulation " in message
    assert ", or model.gradient_checkpointing true and accumulation " in message


def test_a_config_file_that_does_not_exist(config: Path, capsys: pytest.CaptureFixture[str]):
    assert main([str(config.with_name("confg.yaml"))]) == 2
    text = capsys.readouterr().err
    assert "confg.yaml does not exist" in text
    assert "Did you mean config.yaml?" in text


def test_data_without_an_index(refused: Callable[..., str], tmp_path: Path):
    text = refused(f"data.path={tmp_path}")
    assert f"run `latentmill index {tmp_path}`" in text
    assert "data.path" in text


def test_a_shard_that_is_gone(refused: Callable[..., str], own_shards: Path):
    (own_shards / "tiny-0003.tar").unlink()
    text = refused(f"data.path={own_shards}")
    assert "tiny-0003.tar is missing" in text
    assert "data.shards, or --shards" in text


def test_a_shard_that_has_changed(refused: Callable[..., str], own_shards: Path):
    shard = own_shards / "tiny-0003.tar"
    shard.write_bytes(shard.read_bytes() + bytes(512))
    assert "tiny-0003.tar has" in refused(f"data.path={own_shards}")


def test_a_split_that_the_index_does_not_have(refused: Callable[..., str]):
    assert "'trian': the index has the splits" in refused("data.split=trian")
    text = refused("evaluation.split=validation")
    assert "evaluation.split = 'validation': the index has" in text
    assert "held_out" in text


def test_a_split_without_samples(refused: Callable[..., str], own_shards: Path):
    build_index(own_shards, split=SplitSpec(fractions={"train": 1 - 1e-12, "held_out": 1e-12}))
    text = refused(f"data.path={own_shards}")
    assert "evaluation.split = 'held_out' holds no sample" in text
    text = refused(f"data.path={own_shards}", "data.split=held_out", "evaluation.split=train")
    assert "data.split" in text


def test_a_dry_run_sees_what_is_wrong_with_the_data(refused: Callable[..., str], own_shards: Path):
    (own_shards / "tiny-0003.tar").unlink()
    has_rate = "objective.regularisers=[{kind: kl}]"  # else a warning comes first
    text = refused(f"data.path={own_shards}", has_rate, "--dry-run")
    assert "tiny-0003.tar is missing" in text


def test_a_run_directory_below_a_file(refused: Callable[..., str], config: Path):
    text = refused(f"run_dir={config}/run")
    assert f"run_dir: must be a directory, and {config} is a file" in text


def test_a_run_directory_that_may_only_be_read(refused: Callable[..., str]):
    # Root may write anywhere, but not to the kernel's own files.
    text = refused("run_dir=/proc/latentmill")
    assert "cannot write to the run directory /proc/latentmill" in text
    assert "Set run_dir to a directory that you can write to" in text


@pytest.mark.slow
def test_a_run_directory_in_which_another_process_trains(
    start_processes: Callable[..., Processes], config: Path, capsys: pytest.CaptureFixture[str]
):
    other = start_processes("pipeline.train", None, config, "num_steps=1000000")
    other.wait_for("step 50/", timeout=90)
    assert main([str(config), "num_steps=1000000"]) == 2
    text = capsys.readouterr().err
    holder = f"process {other.pid} on {socket.gethostname()}"
    assert f"{holder} is running in {config.parent}/run" in text
    assert other.running
    outcome = json.loads((config.parent / "run" / "outcome.json").read_text())
    assert outcome["status"] == "running"


@pytest.mark.distributed
def test_a_batch_that_does_not_divide_over_the_processes(
    run_processes: Callable[..., Result], config: Path
):
    result = run_processes("pipeline.train", 2, config, "batch_size=6", "accumulation=2")
    assert result.code != 0
    expected = (
        "error: batch_size 6 is not divisible by 2 processes x accumulation 2 = 4. Set batch_size "
        "to 8, or use 1, 3 processes."
    )
    assert result.output.count(expected) == 1
    assert 'pipeline/train.py", line' not in result.output
    assert not (config.parent / "run").exists()


def test_a_process_that_does_not_know_where_the_others_are(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("WORLD_SIZE", "2")
    text = refused()
    assert "WORLD_SIZE announces 2 processes, but RANK, MASTER_ADDR, MASTER_PORT is not set" in text
    assert "latentmill config cpu-ddp" in text


def test_processes_that_each_believe_to_be_alone(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
):
    PartialState()  # accelerate keeps what it found at its first use: one process
    launch = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "::1", "MASTER_PORT": "29500"}
    for name, value in launch.items():
        monkeypatch.setenv(name, value)
    text = refused()
    ctypes.CDLL(None).prctl(1, 0)  # undo PR_SET_PDEATHSIG, which launched processes set
    assert "the launcher announced process 0 of 2 (RANK, WORLD_SIZE), but accelerate runs" in text
    assert "the processes do not see each other" in text


@pytest.mark.distributed
def test_two_launched_processes_that_do_not_see_each_other(
    config: Path, tmp_path: Path, start_processes: Callable[..., Processes]
):
    """A launcher that sets RANK and WORLD_SIZE, but not MASTER_ADDR."""
    both = [
        start_processes("pipeline.train", None, config, env={"RANK": str(rank), "WORLD_SIZE": "2"})
        for rank in range(2)
    ]
    results = [processes.wait(60) for processes in both]
    assert [result.code for result in results] == [2, 2]
    for result in results:  # without a launcher's output
        text = result.output
        assert "WORLD_SIZE announces 2 processes, but MASTER_ADDR, MASTER_PORT is not set" in text
        assert "latentmill config cpu-ddp" in text
        assert "Traceback" not in text
    assert not (tmp_path / "run").exists()


@pytest.mark.distributed
@pytest.mark.skipif(torch.cuda.is_available(), reason="the trap exists on machines without a GPU")
def test_multi_gpu_on_a_machine_without_one_still_trains_together(config: Path, tmp_path: Path):
    """Without ACCELERATE_USE_CPU, each of two processes may take itself for the only one."""
    argv = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    argv += ["--num_processes", "2", "-m", "pipeline.train", str(config)]
    env = {k: v for k, v in (os.environ | CPU_ENV).items() if k != "ACCELERATE_USE_CPU"}
    started = subprocess.run(
        argv, env=env, cwd=ROOT, capture_output=True, text=True, check=False, timeout=180
    )
    assert started.returncode == 0, started.stderr
    assert started.stderr.count("done at step 2") == 1
    [state] = (tmp_path / "run").glob("checkpoints/step-2/state.json")
    assert json.loads(state.read_text())["world"] == 2


@pytest.mark.parametrize(
    ("suffix", "good", "bad", "stage", "decode"),
    [
        ("png", lambda n: png(tiny_image(n)), b"no picture", "decode", "{kind: image, size: 8}"),
        (
            "npy",
            lambda n: np.full((2, 3), n / 60, np.float32),
            np.full((2, 3), 1.5, np.float32),
            "range",
            "{kind: array, shape: [2, 3], range: [0, 1]}",
        ),
    ],
    ids=["picture that does not decode", "array outside its range"],
)
def test_a_bad_sample_is_counted_and_listed_and_stops_nobody(
    config: Path,
    tmp_path: Path,
    suffix: str,
    good: Callable[[int], Any],
    bad: Any,
    stage: str,
    decode: str,
):
    shards = tmp_path / "bad"
    shards.mkdir()
    with TarWriter(str(shards / "0.tar")) as tar:
        for number in range(60):
            content = bad if number in (7, 31) else good(number)
            tar.write({"__key__": f"{number:04d}", suffix: content})
    build_index(shards, split=SPLIT)
    overrides = [f"data.path={shards}", f"data.decode={decode}", "num_steps=12", "data.split=all"]
    assert main([str(config), *overrides, "monitor.log_every_steps=1"]) == 0
    run = tmp_path / "run"
    lines = [json.loads(line) for line in (run / "quarantine.jsonl").read_text().splitlines()]
    assert sorted(line["key"] for line in lines) == ["0007", "0031"]
    assert {line["stage"] for line in lines} == {stage}
    assert all(line["reason"] and line["shard"] == "0.tar" for line in lines)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "train/loss" in record]
    assert len(steps) == 12
    assert np.isfinite([record["train/loss"] for record in steps]).all()
    assert steps[-1]["data/tombstones"] in (2, 3, 4)  # 96 slots of 60 samples
    assert steps[-1]["data/images"] == 96


def test_too_many_bad_samples_end_the_run_with_the_reason(
    config: Path, capsys: pytest.CaptureFixture[str]
):
    # No sample has a JPEG: the bound of 1 % is taken of at least 1000 samples, so 10 may fail.
    assert main([str(config), "data.decode.max_pixels=100"]) == 2
    text = capsys.readouterr().err
    assert "data.max_bad_fraction" in text
    assert "0.01" in text
    assert "Traceback" not in text
    outcome = json.loads((config.parent / "run" / "outcome.json").read_text())
    assert (outcome["status"], outcome["exit_code"]) == ("failed", 2)


def test_a_run_that_allows_it_goes_on_without_one_usable_sample(config: Path, tmp_path: Path):
    assert main([str(config), "data.decode.max_pixels=100", "data.max_bad_fraction=1.0"]) == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    [step] = [values for values in map(json.loads, lines) if "train/loss" in values]
    assert np.isnan(step["train/loss"])
    assert step["data/tombstones"] == step["data/images"] == 16
    assert step["optim/skipped_steps"] == 0
