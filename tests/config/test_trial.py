"""`{trial}` in run_dir: filled in before anything is written, wherever a directory is read."""

from pathlib import Path

import pytest
import yaml

from launch.__main__ import main as launch
from pipeline.commands.doctor.diagnose import diagnose
from pipeline.common import strict
from pipeline.common.errors import UserError
from pipeline.config import TrainConfig, read_config
from pipeline.train import main as train
from tests.processes import ROOT

SHARDS = {"path": "shards", "decode": {"kind": "image", "size": 32}}


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("WANDB_RUN_ID", "7hq2x9ab")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump({"run_dir": "/data/sweep/{trial}", "data": SHARDS}))
    return path


def test_a_config_holds_the_trials_directory(config: Path):
    found = read_config(config)
    assert found.run_dir == "/data/sweep/7hq2x9ab"
    assert read_config(config, ["--run_dir=runs/a/{trial}/{trial}"]).run_dir == (
        "runs/a/7hq2x9ab/7hq2x9ab"
    )
    assert TrainConfig.model_validate({"run_dir": "{trial}", "data": SHARDS}).run_dir == "7hq2x9ab"
    assert "run_dir: /data/sweep/7hq2x9ab\n" in strict.dump(found)


@pytest.mark.parametrize("trial", [None, "", "..", "a/b", ".hidden"])
def test_without_a_trial_there_is_one_error_and_nothing_is_written(
    config: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    trial: str | None,
):
    if trial is None:
        monkeypatch.delenv("WANDB_RUN_ID")
    else:
        monkeypatch.setenv("WANDB_RUN_ID", trial)
    what = "is not set" if not trial else f"is {trial!r}, which cannot name a directory"
    override = f"run_dir={config.parent}/{{trial}}/run"
    with pytest.raises(UserError, match=f"WANDB_RUN_ID {what}"):
        read_config(config, [override])
    for command, main in (([], train), (["slurm"], launch), (["local"], launch)):
        assert main([*command, str(config), override, *([] if command else ["--dry-run"])]) == 2
        printed = capsys.readouterr()
        assert f"WANDB_RUN_ID {what}" in printed.err
        assert printed.err.count("error:") == 1
    assert [f.verdict for f in diagnose(config, [override]) if f.check == "config"] == ["FAIL"]
    assert list(config.parent.iterdir()) == [config]


def test_dry_run_and_doctor_show_it(
    config: Path, tiny_shards: Path, capsys: pytest.CaptureFixture[str]
):
    assert train([str(config), f"data.path={tiny_shards}", "batch_size=8", "--dry-run"]) == 0
    assert "run_dir: /data/sweep/7hq2x9ab" in capsys.readouterr().out
    [disk] = [found.text for found in diagnose(config) if found.check == "disk"]
    assert "in /data/sweep/7hq2x9ab;" in disk


def test_a_cluster_gets_the_trial_and_its_directory(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(ROOT)
    for place in (["slurm"], ["k8s", "--image", "i:1", "--claim", "mill"]):
        assert launch([place[0], str(config), *place[1:], "--gpus-per-node", "1"]) == 0
        text = capsys.readouterr().out
        assert "/data/sweep/7hq2x9ab" in text
        assert "export WANDB_RUN_ID=7hq2x9ab" in text or "value: 7hq2x9ab" in text
