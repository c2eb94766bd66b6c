"""W&B beside whole trainings: kills, the death of W&B's own process, `wandb leet`, a sweep."""

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import yaml
from wandb.sdk.launch.sweeps import utils as sweeps
from wandb.sdk.lib.config_util import save_config_file_from_dict

from pipeline.common import strict
from pipeline.config import TrainConfig
from tests.monitoring.pieces import assert_whole, logged, pieces, records, run_of
from tests.monitoring.test_wandb import KEY
from tests.monitoring.wandb_server import WandbServer, serving
from tests.processes import ROOT, Processes

pytestmark = [pytest.mark.usefixtures("no_login"), pytest.mark.fault]
Start = Callable[..., Processes]
ESCAPES = re.compile(r"\x1b(\[[0-9;?>]*[a-zA-Z]|[()][A-Z0-9]|\][^\x07\x1b]*(\x07|\x1b\\))")


def tiny(shards: Path, **settings: object) -> list[str]:
    """Overrides of a shipped config for a training of a second or two."""
    return [
        f"data.path={shards}",
        "data.decode={kind: image, size: 32, channels: 3}",
        "model.backbone={kind: mlp, hidden: [16]}",
        "batch_size=8",
        "optimizer.learning_rate.warmup_samples=0",
        *(f"{name}={value}" for name, value in settings.items()),
    ]


def wait_for(path: Path, process: Processes) -> None:
    limit = time.monotonic() + 90
    while not path.exists():
        assert process.running, process.output
        assert time.monotonic() < limit, process.output
        time.sleep(0.002)


def leet(piece: Path, wanted: str) -> str:
    """What `wandb leet` shows of a run on a terminal of 180 x 50, until a pattern appears."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 180, 0, 0))
    argv = [sys.executable, "-m", "wandb", "leet", str(piece)]
    env = os.environ | {"TERM": "xterm-256color"}
    shown, text, limit = b"", "", time.monotonic() + 60
    with subprocess.Popen(
        argv, stdin=follower, stdout=follower, stderr=follower, env=env, start_new_session=True
    ) as process:
        os.close(follower)
        while not re.search(wanted, text) and time.monotonic() < limit:
            if select.select([leader], [], [], 1)[0]:
                shown += os.read(leader, 65536)
                text = ESCAPES.sub(" ", shown.decode(errors="replace"))
        os.killpg(process.pid, signal.SIGKILL)
    os.close(leader)
    return text


# The kill comes right after a checkpoint, whose records W&B had no time to write.
def test_the_last_piece_is_whole_after_kills(
    tmp_path: Path, tiny_shards: Path, start_processes: Start
):
    run_dir = tmp_path / "run"
    arguments = [
        ROOT / "configs" / "train" / "ae.yaml",
        f"run_dir={run_dir}",
        *tiny(tiny_shards),
        *("monitor.log_every_steps=10", "evaluation.every_steps=50", "checkpoint.every_steps=50"),
    ]
    for target in (100, 200):
        process = start_processes("pipeline.train", None, *arguments, "num_steps=4000")
        wait_for(run_dir / "checkpoints" / f"step-{target}", process)
        if target == 100:
            psutil.Process(process.pid).kill()  # the trainer alone
            process.wait()
        else:
            process.kill()  # everything, as a power cut
    ended = start_processes("pipeline.train", None, *arguments, "num_steps=300").wait()
    assert ended.code == 0, ended.output
    assert "warning" not in ended.output, ended.output

    rows = logged(run_dir)
    assert list(rows) == list(range(0, 301, 10))
    [piece] = pieces(run_dir / "wandb")
    assert_whole(run_dir, piece)
    resolved = strict.load(TrainConfig, run_dir / "config.yaml", []).model_dump(mode="json")
    config = run_of(piece)["config"]["update"]
    assert {key: value for key, value in config.items() if key != "_wandb"} == resolved
    assert records(piece)[-1]["exit"]["exit_code"] == 0
    wanted = r"(?s)_step +300.*best/eval/loss"
    text = leet(piece, wanted)
    assert re.search(wanted, text), text


def test_training_ends_well_when_wandbs_process_is_killed(
    tmp_path: Path, tiny_shards: Path, start_processes: Start
):
    run_dir = tmp_path / "run"
    arguments = [
        ROOT / "configs" / "train" / "ae.yaml",
        f"run_dir={run_dir}",
        *tiny(tiny_shards, num_steps=1500),
        *("monitor.log_every_steps=20", "evaluation.every_steps=500"),
    ]
    process = start_processes("pipeline.train", None, *arguments)
    process.wait_for("wandb: offline")
    [service] = [p for p in process.everything() if p.name().startswith("wandb-core")]
    service.kill()
    ended = process.wait(timeout=120)
    assert ended.code == 0, ended.output
    assert ended.output.count("W&B failed and is off for the rest of this run") == 1
    assert "Traceback" not in ended.output
    assert list(logged(run_dir)) == list(range(0, 1501, 20))
    assert json.loads((run_dir / "outcome.json").read_text())["status"] == "done"
    assert start_processes("pipeline.train", None, *arguments).wait().code == 0
    [piece] = pieces(run_dir / "wandb")
    assert_whole(run_dir, piece)


def test_a_trial_that_was_killed_goes_on_as_that_trial(
    tmp_path: Path,
    tiny_shards: Path,
    start_processes: Start,
    monkeypatch: pytest.MonkeyPatch,
):
    """Case: the second trial of a sweep was refused. With the agent's variables and arguments."""
    monkeypatch.chdir(tmp_path)
    sweep = yaml.safe_load((ROOT / "configs" / "sweeps" / "beta_sweep.yaml").read_text())
    chosen = {"objective.regularisers.0.weight": 4.0, "optimizer.learning_rate.peak": 2e-4}
    assert sweep["parameters"].keys() == chosen.keys()
    values = {name: {"value": value} for name, value in chosen.items()}
    macros = {"program": [sweep["program"]], **sweeps.create_sweep_command_args({"args": values})}
    words = [macros.get(w[2:-1], [w]) if w[0] == "$" else [w] for w in sweep["command"]]
    verb, *command = [word for group in words for word in group][1:]
    assert (verb, command[:2]) == ("train", ["vae", "run_dir=runs/sweep/{trial}"])
    command[0] = str(ROOT / "configs" / "train" / "vae.yaml")  # as `latentmill train` does

    with serving(WandbServer()) as server:
        env = {
            "WANDB_SWEEP_ID": "s1",
            "WANDB_PROJECT": "swept",
            "WANDB_ENTITY": "team",
            "WANDB_DIR": str(tmp_path),
            "WANDB_BASE_URL": server.url,
            "WANDB_API_KEY": KEY,
        }

        def start(trial: str, num_steps: int) -> Processes:
            parameters = tmp_path / "wandb" / "sweep-s1" / f"config-{trial}.yaml"
            save_config_file_from_dict(str(parameters), values)
            variables = {"WANDB_RUN_ID": trial, "WANDB_SWEEP_PARAM_PATH": str(parameters)}
            lengths = ("monitor.log_every_steps=10", "checkpoint.every_steps=50")
            overrides = tiny(tiny_shards, num_steps=num_steps)
            return start_processes(
                *("pipeline.train", None, *command, *overrides, *lengths),
                env=env | variables,
                cwd=tmp_path,
            )

        first = start("trial-1", 4000)
        first.wait_for("wandb: online")
        wait_for(tmp_path / "runs" / "sweep" / "trial-1" / "checkpoints" / "step-100", first)
        first.kill()
        for trial in ("trial-1", "trial-2"):
            ended = start(trial, 200).wait()
            assert ended.code == 0, ended.output
            assert f"wandb: online {server.url}/team/swept/runs/{trial}" in ended.output
        assert server.runs.keys() == {"trial-1", "trial-2"}
        for trial, run in server.runs.items():
            run_dir = tmp_path / "runs" / "sweep" / trial
            assert (run["sweep"], run["project"]) == ("s1", "swept")
            assert server.steps(trial) == list(logged(run_dir)) == list(range(0, 201, 10))
            config = yaml.safe_load((run_dir / "config.yaml").read_text())
            assert config["run_dir"] == f"runs/sweep/{trial}"
            assert config["objective"]["regularisers"][0]["weight"] == 4.0
            sent = {name: entry["value"] for name, entry in json.loads(run["config"]).items()}
            assert chosen.items() <= sent.items()
            assert (run_dir / "wandb" / "run-id").read_text() == trial
