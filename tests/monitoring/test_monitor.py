"""The log of a run: metrics.jsonl, pictures, the console's line, and W&B's files.

W&B is the real library, offline; its files are read with wandb's own record definitions.
"""

import json
import math
import os
import resource
import time
from collections import Counter

import numpy as np
import psutil
import pytest
import wandb
from PIL import Image

from pipeline.common import strict
from pipeline.config import TrainConfig
from pipeline.monitoring.monitor import Monitor, MonitorConfig, truncate_records
from pipeline.monitoring.wandb_pieces import read_piece
from tests.processes import ROOT

OFFLINE, DISABLED = {"mode": "offline"}, {"mode": "disabled"}


@pytest.fixture(autouse=True)
def no_login(monkeypatch, tmp_path):
    """Keep the W&B account and settings of this machine's user out of the tests."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    yield
    wandb.teardown()


def open_monitor(run_dir, wandb, *, step=0, is_main=True, num_steps=100):
    run_dir.mkdir(exist_ok=True)
    config = MonitorConfig.model_validate({"wandb": wandb})
    resolved = {"seed": 3, "data": {"path": "x"}}
    return Monitor(
        run_dir, config, resolved=resolved, step=step, num_steps=num_steps, is_main=is_main
    )


def lines(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def logged(run_dir):
    """The values of metrics.jsonl, step by step."""
    rows = {}
    for record in lines(run_dir):
        values = {k: v for k, v in record.items() if k not in ("step", "time")}
        rows[record["step"]] = rows.get(record["step"], {}) | values
    return rows


def pieces(run_dir):
    wandb.teardown()  # this process's wandb-core still writes after `finish`
    return sorted((run_dir / "wandb").glob("offline-run-*/*.wandb"))


def joined(run_dir):
    """The rows of all pieces of one run, a later piece replacing the steps from its start on."""
    rows, ids = {}, set()
    for path in pieces(run_dir):
        records = list(read_piece(path))
        run = next((record.run for record in records if record.HasField("run")), None)
        if run is None:
            continue  # the kill came before W&B wrote anything
        ids.add(run.run_id)
        start = run.branch_point.value if run.HasField("branch_point") else -1
        rows = {step: row for step, row in rows.items() if step <= start}
        found = Counter(r.history.step.num for r in records if r.HasField("history"))
        assert all(count == 1 and step > start for step, count in found.items())
        for record in records:
            if record.HasField("history"):
                # A picture is several items: images/eval/path, images/eval/sha256, ...
                items = {"/".join(i.nested_key): i.value_json for i in record.history.item}
                rows[record.history.step.num] = {
                    key: json.loads(text) for key, text in items.items() if key[0] != "_"
                }
    assert len(ids) == 1
    return rows


def assert_same(rows, expected, *, pictures=()):
    """Rows of W&B against those of metrics.jsonl; NaN equals NaN."""
    assert list(rows) == list(expected)
    for step, row in rows.items():
        scalars = {key: value for key, value in row.items() if not key.startswith("images/")}
        assert scalars.keys() == expected[step].keys()
        for key, value in scalars.items():
            assert float(value) == pytest.approx(expected[step][key], rel=1e-12, nan_ok=True)
    assert {step for step, row in rows.items() if "images/eval/path" in row} == set(pictures)


def test_every_value_is_in_metrics_jsonl_at_once(tmp_path):
    with open_monitor(tmp_path / "run", DISABLED) as monitor:
        before = time.time()
        monitor.log(5, {"a": 1.5})
        monitor.log(5, {"b": math.nan, "c": math.inf})
        first, second = lines(tmp_path / "run")  # although the monitor is still open
        assert (first["step"], first["a"]) == (second["step"], first["a"]) == (5, 1.5)
        assert math.isnan(second["b"])
        assert math.isinf(second["c"])
        assert before - 0.01 <= first["time"] <= time.time() + 0.01
    assert not (tmp_path / "run" / "wandb").exists()


def test_other_ranks_are_silent(tmp_path, capsys):
    with open_monitor(tmp_path / "run", OFFLINE, is_main=False) as monitor:
        monitor.log(1, {"a": 1.0})
        monitor.picture(1, "eval", np.zeros((4, 4, 3), np.uint8))
        monitor.progress(1, {})
        monitor.print_line("hello")
    assert list((tmp_path / "run").iterdir()) == []
    assert capsys.readouterr() == ("", "")


def test_a_resume_drops_later_records_and_a_half_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    whole = [json.dumps({"step": step, "x": step / 3}) + "\n" for step in (0, 10, 20, 20, 30)]
    for half in ("", '{"step": 4', '{"step": 20, "x": 1}'):
        for step, kept in ((-1, 0), (0, 1), (15, 2), (20, 4), (40, 5)):
            path.write_text("".join(whole) + half)
            records = truncate_records(path, step)
            assert path.read_text() == "".join(whole[:kept])
            assert records == [json.loads(line) for line in whole[:kept]]
    assert truncate_records(tmp_path / "none", 3) == []


def test_a_run_that_begins_again_at_step_0_repeats_no_record(tmp_path):
    for value in (0.0, 1.0):
        time.sleep(value)  # the name of a piece holds its second
        with open_monitor(tmp_path / "run", OFFLINE) as monitor:
            monitor.log(0, {"a": value})
            monitor.log(10, {"a": value})
    assert logged(tmp_path / "run") == {0: {"a": 1.0}, 10: {"a": 1.0}}
    assert len(lines(tmp_path / "run")) == 2
    assert_same(joined(tmp_path / "run"), logged(tmp_path / "run"))


def test_a_picture_is_a_png_of_the_very_pixels(tmp_path):
    pixels = np.random.Generator(np.random.Philox(key=1)).integers(0, 256, (64, 128, 3), np.uint8)
    with open_monitor(tmp_path / "run", OFFLINE) as monitor:
        monitor.picture(7, "eval", pixels)
        monitor.log(7, {"eval/loss": 1.0})
    image = Image.open(tmp_path / "run" / "images" / "eval-00000007.png")
    assert np.array_equal(np.asarray(image), pixels)
    row = joined(tmp_path / "run")[7]
    assert row["eval/loss"] == 1.0
    media = pieces(tmp_path / "run")[0].parent / "files" / row["images/eval/path"]
    assert np.array_equal(np.asarray(Image.open(media)), pixels)


def test_the_progress_line_says_loss_speed_stalls_and_time_left(tmp_path, capsys):
    values = {"train/loss": 12.345678, "perf/images_per_second": 1234.5}
    with open_monitor(tmp_path / "run", DISABLED, step=20, num_steps=2020) as monitor:
        time.sleep(0.25)
        monitor.progress(30, values | {"perf/data_wait_fraction": 0.256})
    line = capsys.readouterr().err
    assert line.startswith("step 30/2,020  loss 12.35  1,234 images/s  waiting for data 26%  0:")
    # 10 steps took 0.25 s or a little more: the 1,990 others take 50 s or a little more.
    assert 49 <= int(line.split("0:")[-1].removesuffix(" left\n")) < 60


def test_a_full_disk_loses_no_record_and_stops_nothing(tmp_path, capsys):
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    with open_monitor(tmp_path / "run", DISABLED) as monitor:
        monitor.log(1, {"a": 0.5})
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, unlimited[1]))
        try:
            monitor.log(2, {"a": 0.25})
            monitor.log(3, {"a": 0.125})
            monitor.picture(3, "eval", np.zeros((512, 512, 3), np.uint8))
            assert [record["step"] for record in lines(tmp_path / "run")] == [1, 2]
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        monitor.log(4, {"a": 0.0})
    assert logged(tmp_path / "run") == {1: {"a": 0.5}, 2: {"a": 0.25}, 3: {"a": 0.125}, 4: {"a": 0}}
    assert list((tmp_path / "run" / "images").iterdir()) == []
    printed = capsys.readouterr().err
    assert "metrics.jsonl could not be written" in printed
    assert "eval-00000003.png could not be written" in printed


@pytest.mark.parametrize(
    ("mode", "environment"),
    [("auto", {}), ("auto", {"WANDB_MODE": "disabled"}), ("offline", {"WANDB_MODE": "online"})],
)
def test_the_config_decides_and_no_login_means_offline(tmp_path, monkeypatch, mode, environment):
    for name, value in {**environment, "WANDB_RUN_ID": "other", "WANDB_PROJECT": "other"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.stdin", None)  # no login prompt
    started = time.monotonic()
    for step in (0, 1):
        time.sleep(step)  # the name of a piece holds its second
        with open_monitor(tmp_path / "run", {"mode": mode, "tags": ["t"]}, step=step) as monitor:
            monitor.log(step + 1, {"a": 1.0, "b": math.nan})
            monitor.log(step + 1, {"c": 2.0})
    assert time.monotonic() - started < 30
    assert len(pieces(tmp_path / "run")) == 2
    assert_same(joined(tmp_path / "run"), logged(tmp_path / "run"))
    records = list(read_piece(pieces(tmp_path / "run")[0]))
    run = next(record.run for record in records if record.HasField("run"))
    assert run.run_id == (tmp_path / "run" / "wandb" / "run-id").read_text()
    assert (run.project, run.display_name, list(run.tags)) == ("latentmill", "run", ["t"])
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert {"seed": 3, "data": {"path": "x"}}.items() <= config.items()


def test_an_unwritable_wandb_directory_costs_one_warning(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "wandb").write_text("in the way")
    with open_monitor(tmp_path / "run", OFFLINE) as monitor:
        for step in range(5):
            monitor.log(step, {"a": float(step)})
            monitor.picture(step, "eval", np.zeros((4, 4, 3), np.uint8))
    assert list(logged(tmp_path / "run")) == list(range(5))
    assert capsys.readouterr().err.count("W&B failed and is off for the rest of this run") == 1


def train_settings(tmp_path, tiny_shards, **settings):
    return [
        ROOT / "configs" / "train" / "ae.yaml",
        f"run_dir={tmp_path / 'run'}",
        f"data.path={tiny_shards}",
        "data.decode={kind: image, size: 32, channels: 3}",
        "model.backbone={kind: mlp, hidden: [16]}",
        "batch_size=8",
        "optimizer.learning_rate.warmup_samples=0",
        "monitor.wandb.mode=offline",
        *(f"{name}={value}" for name, value in settings.items()),
    ]


# The kill comes right after a checkpoint, whose records W&B had no time to write.
@pytest.mark.fault
def test_offline_pieces_hold_every_step_once_over_kills(tmp_path, tiny_shards, start_processes):
    run_dir = tmp_path / "run"
    settings = {
        "num_steps": 4000,
        "monitor.log_every_steps": 10,
        "evaluation.every_steps": 50,
        "checkpoint.every_steps": 50,
    }
    arguments = train_settings(tmp_path, tiny_shards, **settings)
    for target in (100, 200):
        process = start_processes("pipeline.train", None, *arguments)
        limit = time.monotonic() + 90
        while not (run_dir / "checkpoints" / f"step-{target}").exists():
            assert process.running, process.output
            assert time.monotonic() < limit, process.output
            time.sleep(0.002)
        if target == 100:
            psutil.Process(process.pid).kill()  # the trainer alone
            process.wait()
        else:
            process.kill()  # everything, as a power cut
    arguments = train_settings(tmp_path, tiny_shards, **settings | {"num_steps": 300})
    ended = start_processes("pipeline.train", None, *arguments).wait()
    assert ended.code == 0, ended.output
    assert "W&B failed" not in ended.output, ended.output

    expected = logged(run_dir)
    assert list(expected) == list(range(0, 301, 10))
    evaluated = range(0, 301, 50)
    assert len(lines(run_dir)) == len(expected) + len(evaluated) - 1  # step 0 trains nothing
    assert len(pieces(run_dir)) == 3
    assert_same(joined(run_dir), expected, pictures=evaluated)
    resolved = strict.load(TrainConfig, run_dir / "config.yaml", []).model_dump(mode="json")
    records = list(read_piece(pieces(run_dir)[-1]))
    run = next(record.run for record in records if record.HasField("run"))
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert {key: value for key, value in config.items() if key != "_wandb"} == resolved
    assert records[-1].HasField("exit")
    assert records[-1].exit.exit_code == 0


@pytest.mark.fault
def test_training_ends_well_when_wandbs_process_is_killed(tmp_path, tiny_shards, start_processes):
    settings = {"num_steps": 1500, "monitor.log_every_steps": 20, "evaluation.every_steps": 500}
    arguments = train_settings(tmp_path, tiny_shards, **settings)
    process = start_processes("pipeline.train", None, *arguments)
    process.wait_for("step 100/1,500")
    [service] = [p for p in process.everything() if p.name().startswith("wandb-core")]
    service.kill()
    ended = process.wait(timeout=120)
    assert ended.code == 0, ended.output
    assert ended.output.count("W&B failed and is off for the rest of this run") == 1
    assert "Traceback" not in ended.output
    assert list(logged(tmp_path / "run")) == list(range(0, 1501, 20))
    assert json.loads((tmp_path / "run" / "outcome.json").read_text())["status"] == "done"
