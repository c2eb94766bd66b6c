"""What a config allows and nobody means: told by a dry run and by doctor, with value and remedy."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.common import strict
from pipeline.config import TrainConfig
from pipeline.data.index import Index, build_index
from pipeline.data.index.splits import SplitSpec
from pipeline.data.pack.parts import few_shards
from pipeline.train import main
from pipeline.training.sense import doubts
from tests.shards import write_tiny_shards

SOUND = {"model": {"bottleneck": {"kind": "deterministic"}}, "num_steps": 10, "batch_size": 10}
VAE = {"model": {"bottleneck": {"kind": "gaussian"}}}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """700 samples, of which enough are held out."""
    folder = tmp_path_factory.mktemp("data")
    write_tiny_shards(folder, counts=(100,) * 7)
    build_index(folder, split=SplitSpec(fractions={"train": 0.7, "held_out": 0.3}))
    return folder


def config_of(data: Path, **settings: Any) -> TrainConfig:
    tree = {"run_dir": "run", "data": {"path": str(data)}} | SOUND | settings
    return strict.load(TrainConfig, None, [], text=json.dumps(tree))


def told(data: Path, **settings: Any) -> dict[str, str]:
    return dict(doubts(config_of(data, **settings), [Index.open(data)]))


def test_nothing_is_said_of_a_sound_run(data: Path):
    index = Index.open(data)
    assert int(index.counts("held_out").sum()) >= 100
    few = {"shards"}  # 7 shards are fewer than the GPUs of a node
    assert set(told(data)) == few
    kl = {"objective": {"regularisers": [{"kind": "kl"}]}}
    assert set(told(data, **VAE, **kl)) == few


def test_a_random_bottleneck_without_a_rate(data: Path):
    text = told(data, **VAE)["objective"]
    assert "nothing keeps the variance from shrinking to 0" in text
    assert "set objective.regularisers to [{kind: kl}]" in text
    never = {"objective": {"regularisers": [{"kind": "kl", "weight": 0.0}]}}
    assert "kl of weight 0" in told(data, **VAE, **never)["objective"]
    later = {"kind": "linear", "start": 0.0, "end": 1.0, "over_samples": 50}
    later = {"objective": {"regularisers": [{"kind": "kl", "weight": later}]}}
    assert "objective" not in told(data, **VAE, **later)
    assert "objective" not in told(data, **VAE, freeze=["encoder.*"])  # of a decoder alone
    assert "objective" in told(data, **VAE, freeze=["encoder.0.*"])


def test_more_epochs_than_anybody_trains(data: Path):
    num_train = int(Index.open(data).counts("train").sum())
    bound = 2000 * num_train // 10
    assert "length" not in told(data, num_steps=bound)
    text = told(data, num_steps=bound + 1)["length"]
    assert f"2,000 epochs of {num_train:,} samples, more than 2,000" in text
    assert f"200 epochs are num_steps={200 * num_train // 10:,}" in text


def test_a_batch_above_the_data(data: Path):
    num_train = int(Index.open(data).counts("train").sum())
    assert "batch" not in told(data, batch_size=num_train)
    text = told(data, batch_size=num_train + 1)["batch"]
    assert f"batch_size {num_train + 1} is above the {num_train} samples" in text


def test_the_rule_that_is_advised_holds_out_enough(tmp_path: Path):
    """The remedy is typed: what it leaves is no longer told."""
    write_tiny_shards(tmp_path, counts=(400, 400))
    build_index(tmp_path)
    text = told(tmp_path)["split"]
    assert "fewer than 100" in text
    rule = text.partition("--split '")[2].removesuffix("'`")
    build_index(tmp_path, split=strict.load(SplitSpec, None, [], text=rule))
    assert "split" not in told(tmp_path)


def test_fewer_shards_than_processes():
    text = few_shards(1, 944)
    assert "1 shard: one task each, so at most 1 of an export's processes has work" in text
    assert "--shard-samples 59 for 16 shards" in text
    assert few_shards(8, 944) == ""
    assert "--shard-samples 30 for 32 shards" not in few_shards(8, 944, 32)  # too small a set
    assert "--shard-samples 63 for 32 shards" in few_shards(8, 2000, 32)
    assert few_shards(1, 60) == ""


def test_a_dry_run_warns_and_its_config_stays_a_config(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config = config_of(data, batch_size=1000, **VAE)
    path = tmp_path / "run.yaml"
    path.write_text(config.model_dump_json())
    assert main([str(path), "--dry-run"]) == 0
    printed = capsys.readouterr()
    assert strict.load(TrainConfig, None, [], text=printed.out) == config.resolved()
    warnings = printed.err.splitlines()
    assert [line.split(": ")[:2] for line in warnings] == [
        ["warning", what] for what in ("objective", "batch", "shards")
    ]
