"""Small runs for tests of launchers, their results, and free ports."""

import json
import socket
from pathlib import Path

from safetensors.torch import load_file

from pipeline.checkpoints.folder import verify_checkpoint
from pipeline.models.autoencoder import tensors_sha256


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def write_config(folder: Path, data: Path, num_steps: int, run: str = "run") -> Path:
    """A small denoising VAE that writes to folder/run and saves only where it must.

    No step depends on `num_steps`: a test may set that later.
    """
    path = folder / "config.yaml"
    path.write_text(
        f"run_dir: {folder / run}\n"
        f"data: {{path: {data}, decode: {{kind: image, size: 32, channels: 3}}}}\n"
        "model: {bottleneck: {kind: gaussian, size: 8}}\n"
        "corruptions: [{kind: gaussian_noise}]\n"
        "objective: {regularisers: [{kind: kl, weight: 1.0}]}\n"
        "optimizer: {learning_rate: {peak: 1e-3, final: 1e-3, warmup_samples: 24}}\n"
        "batch_size: 12\n"
        f"num_steps: {num_steps}\n"
        "evaluation: {every_steps: 1000000}\n"
        "checkpoint: {every_steps: 1000000}\n"
        "monitor: {log_every_steps: 1, num_images: 0, wandb: {mode: disabled}}\n"
    )
    return path


def outcome(run: Path) -> dict:
    path = run / "outcome.json"
    return json.loads(path.read_bytes()) if path.exists() else {"status": None}


def num_logged(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_text().count("train/loss") if path.exists() else 0


def result_of(run: Path, step: int) -> dict:
    """The parts in which two runs must be equal: last checkpoint, and loss of each step."""
    assert outcome(run) == {"status": "done", "exit_code": 0, "step": step, "message": ""}
    path = run / "checkpoints" / f"step-{step}"
    verify_checkpoint(path)
    tensors = {file.name: tensors_sha256(load_file(file)) for file in path.glob("*.safetensors")}
    assert tensors.keys() == {"model.safetensors", "ema.safetensors", "optimizer.safetensors"}
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [(one["step"], one["train/loss"]) for one in records if "train/loss" in one]
    assert [number for number, _ in losses] == list(range(1, step + 1))
    return {"state": (path / "state.json").read_text(), "losses": losses} | tensors
