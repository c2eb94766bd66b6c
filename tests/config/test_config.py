"""The rules that join several settings, and what --dry-run says about a config."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pipeline.common import strict
from pipeline.common.errors import UserError
from pipeline.config import VERSION, TrainConfig, fill_in_defaults, read_config
from pipeline.data.index.splits import SplitSpec
from pipeline.train import main

MINIMAL = {"run_dir": "r", "data": {"path": "d"}}


def load(*overrides: str) -> TrainConfig:
    return strict.load(TrainConfig, None, overrides, text=json.dumps(MINIMAL))


KL = "objective.regularisers=[{kind: kl}]"
CONTRADICTIONS = [
    (
        [KL, "model.bottleneck={kind: deterministic}"],
        "regulariser kl needs a density, but model.bottleneck.kind is deterministic: take",
    ),
    (
        ["objective.regularisers=[{kind: kl}, {kind: kl, weight: 2.0}]"],
        "objective.regularisers names a kind twice: kl, kl",
    ),
    (
        ["evaluation.metrics=[{kind: squared_error}, {kind: squared_error}]"],
        "evaluation.metrics names a figure twice: squared_error, squared_error",
    ),
    (
        ["objective.emphasis.corrupted=2.0", "corruptions=[{kind: gaussian_noise}]"],
        "objective.emphasis weighs corrupted elements, but no corruption marks any: add masking, ",
    ),
    (["batch_size=10", "accumulation=4"], "accumulation 4 does not divide batch_size 10"),
    (["batch_size=10", "data.lanes=4"], "data.lanes 4 does not divide batch_size 10"),
    (
        ["optimizer.learning_rate.final=0.01"],
        "optimizer.learning_rate.final 0.01 is above its peak 0.001",
    ),
    (
        ["num_steps=10", "batch_size=8", "optimizer.learning_rate.warmup_samples=81"],
        "optimizer.learning_rate.warmup_samples 81 is more than the run's num_steps * batch_size "
        "= 80 samples",
    ),
    (
        ["data.decode.size=48"],
        "backbone burgess takes images [C, 64, 64] or [C, 32, 32], not [3, 48, 48]",
    ),
    (
        ["corruptions=[{kind: patch_mask, patch_size: 7}]"],
        "patch_mask: patch_size 7 does not divide 64 x 64 pixels",
    ),
    (
        [
            "data.decode={kind: array, shape: [5], range: [0, 1]}",
            "model.backbone={kind: mlp}",
            "corruptions=[{kind: patch_mask}]",
        ],
        "patch_mask needs images [C, H, W], but an event is [5]",
    ),
    (
        ["data.decode={kind: array, shape: [5], range: [1, 1]}", "model.backbone={kind: mlp}"],
        "range must be [lowest, highest], but is [1.0, 1.0]",
    ),
    (
        ["corruptions=[{kind: masking, fraction: [0.5, 0.2]}]"],
        "a severity range is [lowest, highest], but 0.5 > 0.2",
    ),
    (["precision=fp16"], "fp16 is not supported: DeepSpeed's autocast skips its steps; use bf16"),
    (["checkpoint.keep.latest=1"], "checkpoint.keep.latest"),
    (["evaluation.patience=3"], "evaluation.patience 3 needs a metric to be patient with"),
    (
        ["checkpoint.keep.best.metric=eval_ema/loss", "ema_decay=null"],
        "checkpoint.keep.best.metric eval_ema/loss needs averaged weights, but ema_decay is null",
    ),
    (["checkpoint.keep.every_samples=0"], "checkpoint.keep.every_samples"),
    (["watchdog.seconds=0"], "watchdog.seconds"),
    (["ema_decay=1.0"], "ema_decay"),
    (["optimizer.learning_rate.peak=.inf"], "optimizer.learning_rate.peak"),
]


@pytest.mark.parametrize(
    ("overrides", "message"), CONTRADICTIONS, ids=[message for _, message in CONTRADICTIONS]
)
def test_a_contradiction_is_refused_and_named(overrides: list[str], message: str):
    with pytest.raises(UserError) as refused:
        load(*overrides)
    assert message in str(refused.value)
    assert "1 problem" in str(refused.value)


@pytest.mark.parametrize(
    "overrides",
    [
        [KL],
        ["objective.emphasis.corrupted=2.0", "corruptions=[{kind: masking}]"],
        ["batch_size=8", "accumulation=4", "data.lanes=8"],
        ["optimizer.learning_rate.final=0.001"],
        ["num_steps=10", "batch_size=8", "optimizer.learning_rate.warmup_samples=80"],
        ["precision=bf16"],
        ["ema_decay=null"],
        ["evaluation.patience=3", "checkpoint.keep.best.metric=eval_ema/loss"],
        ["watchdog.seconds=null"],
    ],
    ids=str,
)
def test_what_only_just_fits_is_taken(overrides: list[str]):
    config = load(*overrides)
    assert strict.load(TrainConfig, None, [], text=strict.dump(config)) == config


def test_a_config_does_not_change_after_it_was_read():
    config = load()
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3  # pyright: ignore[reportAttributeAccessIssue]


def test_a_missing_key_means_the_default_of_the_version_that_wrote_the_file():
    def before_2(tree: dict[str, Any]) -> None:
        strict.set_default(tree, "optimizer.beta2", 0.9)
        strict.set_default(tree, "objective.emphasis.corrupted", 2.0)

    def read(text: str, *overrides: str, version: int = 1) -> TrainConfig:
        fill_in = partial(fill_in_defaults, version=version, former_defaults={2: before_2})
        text = f"run_dir: r\ndata: {{path: d}}\ncorruptions: [{{kind: masking}}]\n{text}"
        return strict.load(TrainConfig, None, overrides, text=text, fill_in=fill_in)

    def values(config: TrainConfig) -> tuple[int, float, float]:
        return config.version, config.optimizer.beta2, config.objective.emphasis.corrupted

    assert values(read("")) == (1, 0.9, 2.0)
    assert values(read("", version=2)) == (2, 0.999, 1.0)
    assert values(read("version: 2")) == (2, 0.999, 1.0)
    assert values(read("optimizer: {beta1: 0.8}")) == (1, 0.9, 2.0)
    assert values(read("optimizer: {beta2: 0.8}")) == (1, 0.8, 2.0)
    assert values(read("", "optimizer.beta2=0.7")) == (1, 0.7, 2.0)
    written = read("")
    assert strict.load(TrainConfig, None, [], text=strict.dump(written)) == written
    for text in ("optimizer: 3", "version: 4", "version: one"):
        with pytest.raises(UserError, match=text.partition(":")[0]):
            read(text)


def test_a_file_that_cannot_be_parsed_has_one_problem(tmp_path: Path):
    path = tmp_path / "config.yaml"
    path.write_text("run_dir: r\ndata: {path: x\n")
    with pytest.raises(UserError, match="has 1 problem:\n  line 3, column 1: not valid YAML"):
        read_config(path)


def test_a_run_of_version_2_still_evaluates_every_sample(tmp_path: Path):
    path = tmp_path / "config.yaml"
    path.write_text("run_dir: r\ndata: {path: d}\nevaluation: {every_steps: 5}\n")
    assert read_config(path).evaluation.max_samples == 50_000
    for version in (1, 2):
        evaluation = read_config(path, version=version).evaluation
        assert (evaluation.max_samples, evaluation.every_steps) == (None, 5)


def test_a_file_is_read_by_the_version_of_the_run_that_it_goes_on_with(tmp_path: Path):
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps({"run_dir": str(tmp_path / "run"), "data": {"path": "x"}}))
    assert read_config(path).version == VERSION
    (tmp_path / "run").mkdir()
    written = tmp_path / "run" / "config.yaml"
    for text, version in (("seed: 3", 1), ("version: 1", 1), (f"version: {VERSION}", VERSION)):
        written.write_text(text)
        assert read_config(path).version == version
    written.write_text(path.read_text())  # its own config.yaml, of a version that did not say so
    assert read_config(written).version == 1
    assert read_config(path, [f"version={VERSION}"]).version == VERSION


def test_schedules_are_counted_in_samples_and_logged_by_name():
    config = load(
        "objective.regularisers=[{kind: kl, weight: {kind: linear, over_samples: 200}}]",
        *("batch_size=10", "num_steps=40", "optimizer.learning_rate.warmup_samples=100"),
    )
    assert config.total_samples == 400
    assert config.schedule_values(50) == {
        "optim/learning_rate": pytest.approx(0.0005),
        "optim/weight_kl": pytest.approx(0.25),
    }
    assert config.learning_rate_at(400) == pytest.approx(0.0)


def test_the_memory_format_is_the_backbones_own_unless_it_is_given():
    resnet = "model.backbone={kind: resnet, preset: resnet-mini}"
    own = [load(*changes).resolved().channels_last for changes in ((), (resnet,))]
    assert own == [True, False]  # burgess: as every run of the released version has it
    assert load(resnet, "channels_last=true").resolved().channels_last is True
    assert load("channels_last=false").resolved().channels_last is False


@pytest.mark.parametrize(
    ("changes", "num_parameters"),
    [
        # Burgess et al. 2018, Z = 10: counted with mean and log-variance, 2 x 10.
        (["data.decode.channels=1", "model.likelihood={kind: bernoulli}"], 502_005),
        (["data.decode.channels=3", "model.likelihood={kind: bernoulli}"], 504_055),
        (["data.decode.channels=1", "model.likelihood={kind: gaussian}"], 502_006),  # its sigma
        (
            ["data.decode.channels=1", "model.bottleneck.kind=deterministic"]
            + ["model.likelihood={kind: squared_error}"],
            502_005 - 10 * (256 + 1),  # no log-variances
        ),
    ],
)
def test_a_dry_run_counts_and_writes_nothing(
    tiny_shards: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: list[str],
    num_parameters: int,
):
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps({"run_dir": str(tmp_path / "run"), "data": {"path": "x"}}))
    overrides = [f"data.path={tiny_shards}", "batch_size=10", "num_steps=9", *changes]
    assert main([str(path), "--dry-run", *overrides]) == 0
    printed = capsys.readouterr().out
    assert f"# parameters: {num_parameters:,}\n" in printed
    assert "\n#   encoder: 2" in printed
    assert " GFLOP per image (forward)\n" in printed
    assert "\n# latent: 10, " in printed
    assert "\n# activations per image: " in printed
    assert "\n# memory of a step, estimated (ddp): " in printed
    samples = num_train_samples()
    assert f"# samples per epoch (split train): {samples}\n" in printed
    assert f"# steps per epoch: {samples / 10:.1f}; epochs in 9 steps: {90 / samples:.1f}\n" in (
        printed
    )
    # What it printed is the resolved config, and a valid input.
    expected = strict.load(TrainConfig, path, overrides).resolved()
    assert strict.load(TrainConfig, None, [], text=printed) == expected
    assert expected.data.lanes == 10
    assert [file.name for file in tmp_path.iterdir()] == ["config.yaml"]


def num_train_samples() -> int:
    """Of the 60 tiny samples, by the rule of their split."""
    rule = SplitSpec(fractions={"train": 0.75, "held_out": 0.25})
    return sum(rule.names[rule.number_of(f"{number:06d}")] == "train" for number in range(60))


def test_a_run_of_version_1_keeps_its_project_whatever_wandbs_environment_says(tmp_path):
    path = tmp_path / "old.yaml"
    path.write_text("run_dir: r\ndata: {path: d, decode: {kind: image, size: 32}}\n")
    old = read_config(path, ["monitor.wandb.name=n"], version=1).monitor.wandb
    assert (old.mode, old.project, old.tags, old.name) == ("auto", "latentmill", (), "n")
    new = read_config(path).monitor.wandb
    assert (new.mode, new.project, new.tags, new.name) == (None, None, None, None)
