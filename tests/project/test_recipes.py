"""Every training recipe trains: three steps of it, with smaller pictures, networks and batches."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config import TrainConfig
from pipeline.data.index.splits import SplitSpec
from pipeline.data.pack.pack import pack
from pipeline.data.pack.sources import Sprites
from pipeline.train import train
from pipeline.training.loading import load_run
from tests.processes import ROOT

RECIPES = sorted(path.stem for path in (ROOT / "configs" / "train").glob("*.yaml"))
SIDE = 32  # pixels
SMALLER: dict[str, Any] = {
    "data.decode.size": SIDE,
    "batch_size": 4,
    "num_steps": 3,
    "optimizer.learning_rate.warmup_samples": 4,
    "ema_decay": 0.5,
    "evaluation.every_steps": 3,
    "monitor.log_every_steps": 1,
    "monitor.wandb.mode": "disabled",
}


class Recipes:
    """Shrunk runs, each trained once, of one set of pictures."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        split = SplitSpec(fractions={"train": 0.7, "held_out": 0.3})
        pack(Sprites(count=32, shard_samples=16), folder / "data", split=split)

    def run_of(self, name: str) -> Path:
        """Train if that was not done yet; the run directory."""
        run_dir = self._folder / name
        if not run_dir.exists():
            assert train(self.smaller(name, run_dir)) == 0
        return run_dir

    def smaller(self, name: str, run_dir: Path) -> TrainConfig:
        """The recipe with other sizes, and nothing else changed."""
        whole = TrainConfig.load(name)
        changed = {**SMALLER, "run_dir": run_dir, "data.path": self._folder / "data"}
        if whole.model.backbone.kind == "resnet":
            widths = [8, *[16] * (len(whole.model.backbone.widths) - 1)]
            changed |= {"model.backbone.widths": widths, "model.backbone.groups": 4}
        if any(augmentation.kind == "random_crop" for augmentation in whole.data.augmentations):
            changed["data.augmentations.0.shorter_side"] = SIDE + 4
        if whole.init_from is not None:
            changed["init_from"] = self.run_of(Path(whole.init_from).name)
        overrides = [f"{key}={value}" for key, value in changed.items()]
        return TrainConfig.load(name, *overrides)


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> Recipes:
    return Recipes(tmp_path_factory.mktemp("recipes"))


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains(name: str, recipes: Recipes) -> None:
    run_dir = recipes.run_of(name)
    assert json.loads((run_dir / "outcome.json").read_bytes())["step"] == 3
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    losses = [record["train/loss"] for record in lines if "train/loss" in record]
    assert len(losses) == 3
    assert all(math.isfinite(loss) for loss in losses)
    assert any("eval_ema/squared_error" in record for record in lines)


def test_the_fine_tuned_decoder_differs_and_the_encoder_does_not(recipes: Recipes) -> None:
    before = load_run(recipes.run_of("kl_f8"))  # the averaged weights, which init_from takes
    after = load_run(recipes.run_of("decoder_finetune"), weights="raw")
    assert before.encoder_sha256 == after.encoder_sha256
    one, other = (run.model.decoder.state_dict() for run in (before, after))
    assert not torch.equal(one["conv_out.weight"], other["conv_out.weight"])
