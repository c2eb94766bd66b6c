"""`evaluate RUN --size`: a convolutional run is evaluated on pictures of another size."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.__main__ import main
from pipeline.common.errors import UserError
from pipeline.data.decode import ImageDecode
from pipeline.evaluation.request import EvaluationRequest
from pipeline.evaluation.trained import evaluate_run
from pipeline.models.autoencoder import build_autoencoder
from pipeline.training.loading import load_run
from tests.export.world import SHARD_ROWS, make_data, make_run
from tests.shards import pictures_of

pytestmark = pytest.mark.slow

RESNET = {
    "backbone": {"kind": "resnet", "preset": "resnet-mini"},
    "likelihood": {"kind": "squared_error"},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data") / "sprites", shards=1)


def small_batches(run_dir: Path) -> Path:
    """A batch is computed whole, however few samples are in it."""
    text = (run_dir / "config.yaml").read_text()
    (run_dir / "config.yaml").write_text(text.replace("batch_size: 256", "batch_size: 8"))
    return run_dir


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    return small_batches(make_run(tmp_path_factory.mktemp("run"), data, RESNET))


def squared_error_of(data: Path, size: Any, reconstruct: Callable[[Tensor], Tensor]) -> float:
    """Of the reconstructions of all pictures of a data set of one shard."""
    decode = ImageDecode(size=size, channels=1)
    slots = np.zeros((SHARD_ROWS, *decode.buffer_shape), np.uint8)
    for content, slot in zip(pictures_of(data / "shard-000000.tar"), slots, strict=True):
        decode.decode(content, slot)
    x = decode.to_unit(decode.event_view(torch.from_numpy(slots)))
    with torch.no_grad():
        return float((reconstruct(x) - x).square().sum(dim=(1, 2, 3)).mean())


def squared_error_at(run_dir: Path, data: Path, size: Any, weights: Any) -> float:
    """By a model that is built for this size."""

    def reconstruct(x: Tensor) -> Tensor:
        trained = load_run(run_dir, weights=weights)
        model = build_autoencoder(trained.config.model, x.shape[1:], seed=3, dtype=torch.float32)
        model.load_state_dict(trained.model.state_dict())
        code = model.eval()(x, mode="encode").code
        return model(code.posterior.mu, mode="decode").decoded

    return squared_error_of(data, size, reconstruct)


@pytest.mark.parametrize("size, said", [(48, "48"), ((24, 40), "24x40")])
def test_the_error_is_that_of_a_model_that_is_built_for_the_size(
    run_dir: Path, data: Path, size: Any, said: str, capsys: pytest.CaptureFixture[str]
):
    assert main(["evaluate", str(run_dir), "--split", "all", "--size", said, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    for prefix, weights in (("eval", "raw"), ("eval_ema", "ema")):
        by_hand = squared_error_at(run_dir, data, size, weights)
        assert found[f"{prefix}/squared_error"] == pytest.approx(by_hand, rel=1e-4)
        assert found[f"{prefix}/samples"] == SHARD_ROWS
    # One number each, however many values a latent has.
    assert len([name for name in found if "/" in name]) < 20


def test_its_own_size_changes_nothing(run_dir: Path):
    assert (
        evaluate_run(run_dir, request=EvaluationRequest(split="all", size=32)).figures
        == evaluate_run(run_dir, request=EvaluationRequest(split="all")).figures
    )


def test_sizes_that_cannot_be(run_dir: Path, data: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"size is 30, but .* set size to \[28, 28\] or \[32, 32\]"):
        evaluate_run(run_dir, request=EvaluationRequest(split="all", size=30))
    mlp = make_run(tmp_path / "mlp", data, {})
    with pytest.raises(UserError, match="backbone mlp, whose weights take pictures of 32 pixels"):
        evaluate_run(mlp, request=EvaluationRequest(split="all", size=48))


@pytest.mark.parametrize("text", ["0", "12x", "x12", "1x2x3", "-4", "a"])
def test_a_size_that_is_none(text: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", "runs/x", f"--size={text}"])
    assert ended.value.code == 2
    assert "is no size of pictures: write 256, or 256x384" in capsys.readouterr().err
