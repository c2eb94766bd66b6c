"""A run on a card: batches, losses, training, resume, evaluation and export."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from pipeline.common import needs

if absent := [name for name in ("pydantic", "pyarrow") if needs.is_missing(name)] + needs.missing():
    pytest.skip(f"not installed in this Python: {', '.join(absent)}", allow_module_level=True)

from pipeline.common import strict
from pipeline.config import TrainConfig
from pipeline.corruptions import GaussianNoise, Masking, corrupt
from pipeline.data.index import Index
from pipeline.data.settings import DataConfig
from pipeline.data.stream.device import DeviceBatches
from pipeline.distributed.runtime import Runtime
from pipeline.evaluation.trained import evaluate_run
from pipeline.models.autoencoder import build_autoencoder
from pipeline.monitoring.memory import DEVICE_PEAK, read_peak
from pipeline.train import train
from pipeline.training.build import make_forward
from pipeline.training.loading import load_run
from tests.export.world import make_config, run_export, tree
from tests.shards import open_stream

pytestmark = pytest.mark.gpu
NUM_STEPS = 6
DECODE = {"kind": "image", "size": 32}


def opened(folder: Path, device: torch.device):
    data = DataConfig(path=str(folder), decode=DECODE, lanes=2, window=4)
    index = Index.open(folder)
    return open_stream(data, index=index, seed=0, batch_size=8, num_steps=NUM_STEPS, device=device)


def config_of(folder: Path, run_dir: Path, **settings) -> TrainConfig:
    tree = {
        "run_dir": str(run_dir),
        "data": {"path": str(folder), "decode": DECODE},
        "corruptions": [{"kind": "masking", "fraction": 0.2}],
        "objective": {"regularisers": [{"kind": "kl"}]},
        "batch_size": 8,
        "num_steps": NUM_STEPS,
        "checkpoint": {"every_steps": NUM_STEPS // 2},
        "monitor": {"log_every_steps": 1, "wandb": {"mode": "disabled"}},
    }
    return TrainConfig.model_validate_json(json.dumps(tree | settings))


def test_batches_are_copies_that_stay_valid(tiny_shards: Path, device: torch.device):
    with opened(tiny_shards, torch.device("cpu")) as plain:
        expected = [[t.clone() for t in batch.tensors()] for batch in plain]
    with opened(tiny_shards, device) as pinned:
        held = list(DeviceBatches(pinned, device))
    assert len(held) == NUM_STEPS
    for batch, tensors in zip(held, expected, strict=True):
        assert batch.x.device.type == device.type
        assert all(map(torch.equal, (t.cpu() for t in batch.tensors()), tensors))


def test_corruptions_mark_the_same_elements(tiny_shards: Path, device: torch.device):
    kinds = [Masking(fraction=0.3), GaussianNoise(sigma=(0.1, 0.5))]
    x, keys = torch.rand(8, 3, 32, 32), torch.arange(8)
    expected, found = corrupt(x, kinds, keys), corrupt(x.to(device), kinds, keys.to(device))
    assert expected.mask is not None
    assert found.mask is not None
    assert torch.equal(found.mask.cpu(), expected.mask)
    torch.testing.assert_close(found.x.cpu(), expected.x, rtol=1e-5, atol=1e-5)


def test_losses_and_gradients_in_float64_are_those_of_the_cpu(
    tiny_shards: Path, tmp_path: Path, device: torch.device
):
    config = config_of(tiny_shards, tmp_path, precision="fp64")
    with opened(tiny_shards, torch.device("cpu")) as stream:
        batch = next(stream)
    results = []
    for where in (torch.device("cpu"), device):
        shape = config.data.decode.event_shape
        model = build_autoencoder(config.model, shape, seed=0, dtype=torch.float64).to(where)
        forward = make_forward(config, where)
        inputs = forward.inputs(batch.to(where), "train")
        _, losses = forward.run(model, inputs, weights=config.objective.weights_at(0))
        losses.total.mean().backward()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
        results.append((losses.total.detach().cpu(), gradients.cpu()))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-7)


def test_a_resumed_run_has_the_bits_of_one_without_a_break(
    tiny_shards: Path, tmp_path: Path, device: torch.device
):
    whole = config_of(tiny_shards, tmp_path / "whole")
    assert train(whole) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / f"step-{NUM_STEPS}")
    assert train(config_of(tiny_shards, tmp_path / "parts")) == 0
    weights = [load_run(tmp_path / name).weights_sha256 for name in ("whole", "parts")]
    assert weights[0] == weights[1]
    path = tmp_path / "whole" / "metrics.jsonl"
    logged = [json.loads(line) for line in path.read_text().splitlines()]
    [last] = [r for r in logged if r["step"] == NUM_STEPS and "eval/loss" in r]
    again = evaluate_run(tmp_path / "whole").figures
    for name, value in again.items():
        assert value == pytest.approx(last[name], rel=1e-5), name
    assert strict.load(TrainConfig, tmp_path / "whole" / "config.yaml", []) == whole


def test_the_log_has_the_peak_of_the_device_s_memory(
    tiny_shards: Path, tmp_path: Path, device: torch.device, capsys: pytest.CaptureFixture[str]
):
    runtime = Runtime.start(accumulation=1)
    read_peak(runtime)
    for num_bytes in (256 << 20, 64 << 20):  # the second peak is lower: each log starts anew
        before = torch.cuda.memory_allocated(device)
        torch.ones(num_bytes, dtype=torch.uint8, device=device)
        assert read_peak(runtime) == {DEVICE_PEAK: before + num_bytes}
    assert train(config_of(tiny_shards, tmp_path / "run")) == 0
    logged = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    peaks = [record[DEVICE_PEAK] for record in map(json.loads, logged) if "train/loss" in record]
    assert len(peaks) == NUM_STEPS
    assert all(0 < peak < torch.cuda.get_device_properties(device).total_memory for peak in peaks)
    printed = capsys.readouterr().err
    assert len(re.findall(r"^peak device memory [\d.]+ of [\d.]+ GiB$", printed, re.M)) == 1


def test_an_export_has_the_same_bytes_again(
    tiny_shards: Path, tmp_path: Path, device: torch.device
):
    assert train(config_of(tiny_shards, tmp_path / "run", num_steps=1)) == 0
    for name in ("one", "two"):
        assert run_export(make_config(tmp_path / "run", tmp_path / name)) == 0
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    assert (tmp_path / "one" / "_SUCCESS").exists()
