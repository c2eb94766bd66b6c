"""The log of a run: metrics.jsonl, pictures and the console's line; W&B is off."""

import json
import math
import resource
import time

import numpy as np
from PIL import Image

from pipeline.monitoring.monitor import Monitor, MonitorConfig, truncate_records
from pipeline.monitoring.sheets import Sheet


def open_monitor(run_dir, *, step=0, is_main=True, num_steps=100):
    run_dir.mkdir(exist_ok=True)
    config = MonitorConfig.model_validate({"wandb": {"mode": "disabled"}})
    return Monitor(run_dir, config, resolved={}, step=step, num_steps=num_steps, is_main=is_main)


def lines(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_every_value_is_in_metrics_jsonl_at_once(tmp_path):
    with open_monitor(tmp_path / "run") as monitor:
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
    with open_monitor(tmp_path / "run", is_main=False) as monitor:
        monitor.log(1, {"a": 1.0})
        monitor.show(1, "eval", Sheet({"": np.zeros((4, 4, 3), np.uint8)}))
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


def test_a_picture_is_a_png_of_the_very_pixels(tmp_path):
    pixels = np.random.Generator(np.random.Philox(key=1)).integers(0, 256, (64, 128, 3), np.uint8)
    with open_monitor(tmp_path / "run") as monitor:
        monitor.show(7, "eval", Sheet({"": pixels}))
    image = Image.open(tmp_path / "run" / "images" / "eval-00000007.png")
    assert np.array_equal(np.asarray(image), pixels)


def test_the_progress_line_says_loss_speed_stalls_and_time_left(tmp_path, capsys):
    values = {"train/loss": 12.345678, "perf/images_per_second": 1234.5}
    with open_monitor(tmp_path / "run", step=20, num_steps=2020) as monitor:
        time.sleep(0.25)
        monitor.progress(30, values | {"perf/data_wait_fraction": 0.256})
    off, line, _ = capsys.readouterr().err.split("\n")
    assert off == "wandb: off (monitor.wandb.mode=disabled)"
    assert line.startswith("step 30/2,020  loss 12.35  1,234 images/s  waiting for data 26%  0:")
    # 10 steps took 0.25 s or a little more: the 1,990 others take 50 s or a little more.
    assert 49 <= int(line.split("0:")[-1].removesuffix(" left")) < 60


def test_a_full_disk_loses_no_record_and_stops_nothing(tmp_path, capsys):
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    with open_monitor(tmp_path / "run") as monitor:
        monitor.log(1, {"a": 0.5})
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, unlimited[1]))
        try:
            monitor.log(2, {"a": 0.25})
            monitor.log(3, {"a": 0.125})
            monitor.show(3, "eval", Sheet({"": np.zeros((512, 512, 3), np.uint8)}))
            assert [record["step"] for record in lines(tmp_path / "run")] == [1, 2]
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        monitor.log(4, {"a": 0.0})
    assert [(record["step"], record["a"]) for record in lines(tmp_path / "run")] == [
        *((1, 0.5), (2, 0.25), (3, 0.125), (4, 0.0)),
    ]
    assert list((tmp_path / "run" / "images").iterdir()) == []
    printed = capsys.readouterr().err
    assert "metrics.jsonl could not be written" in printed
    assert "eval-00000003.png could not be written" in printed
