"""W&B beside a run: its environment, servers that do not answer, one whole piece per start.

W&B is the real library; its files are read by its own `wandb leet inspect`.
"""

import json
import math
import os
import shutil
import socket
import sys
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import wandb
from PIL import Image

from pipeline.monitoring.monitor import Monitor, MonitorConfig
from pipeline.monitoring.sheets import Sheet
from tests.monitoring.pieces import assert_whole, history, pieces, records, run_of, summary
from tests.monitoring.wandb_server import WandbServer, serving

pytestmark = pytest.mark.usefixtures("no_login")

SLOW = pytest.mark.slow
KEY = "0123456789abcdef" * 2 + "01234567"
PIXELS = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)


def start(
    run_dir: Path,
    *,
    first: int = 0,
    last: int = 3,
    is_main: bool = True,
    step: int | None = None,
    **settings: Any,
) -> Path:
    """A start of a run that logs some steps and a picture of each; returns its folder `wandb`."""
    run_dir.mkdir(exist_ok=True)
    config = MonitorConfig.model_validate({"wandb": settings})
    step = first if step is None else step
    resolved = {"seed": 3, "data": {"path": "x"}}
    with Monitor(
        run_dir, config, resolved=resolved, step=step, num_steps=100, is_main=is_main
    ) as monitor:
        for number in range(first + 1, last + 1):
            monitor.log(number, {"train/loss": 1 / (number + 1), "data/order_digest": 5 * number})
            monitor.show(number, "eval", Sheet({"": PIXELS + number}))
            monitor.log(number, {"eval/loss": abs(number - 2.0), "b": math.nan})
    return Path(os.environ.get("WANDB_DIR", run_dir)) / "wandb"


def test_the_environment_is_obeyed_where_the_config_is_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Case: WANDB_PROJECT, WANDB_NAME, WANDB_ENTITY and the others were overruled by defaults."""
    names = {
        "WANDB_MODE": "offline",
        "WANDB_PROJECT": "p",
        "WANDB_NAME": "n",
        "WANDB_ENTITY": "e",
        "WANDB_RUN_GROUP": "g",
        "WANDB_TAGS": "t,u",
        "WANDB_NOTES": "w",
        "WANDB_RUN_ID": "mine",
        "WANDB_JOB_TYPE": "j",
        "WANDB_DIR": str(tmp_path / "elsewhere"),
    }
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    [piece] = pieces(start(tmp_path / "run"))
    assert piece.parent == tmp_path / "elsewhere" / "wandb"
    run = run_of(piece)
    given = ("project", "display_name", "entity", "run_group", "notes", "run_id", "job_type")
    assert [run[name] for name in given] == ["p", "n", "e", "g", "w", "mine", "j"]
    assert run["tags"] == ["t", "u"]
    assert (tmp_path / "run" / "wandb" / "run-id").read_text() == "mine"
    assert not list((tmp_path / "run" / "wandb").glob("*run-2*"))


def test_the_config_overrules_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """So does the config.yaml of an old run, which states the former defaults."""
    for name in ("PROJECT", "NAME", "RUN_GROUP", "TAGS"):
        monkeypatch.setenv(f"WANDB_{name}", "other")
    for mode in ("online", "disabled"):
        monkeypatch.setenv("WANDB_MODE", mode)
        monkeypatch.setenv("WANDB_DISABLED", "true")
        settings = {"name": "n", "group": "g", "tags": (), "project": "latentmill"}
        root = start(tmp_path / mode, mode="auto" if mode == "disabled" else "offline", **settings)
        [piece] = pieces(root)
        run = run_of(piece)
        assert (run["project"], run["display_name"], run["run_group"]) == ("latentmill", "n", "g")
        assert not run.get("tags")


@SLOW
def test_without_any_word_the_run_is_offline_and_named_like_its_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    [piece] = pieces(start(tmp_path / "run"))
    run = run_of(piece)
    assert (run["project"], run["display_name"]) == ("latentmill", "run")
    assert run["run_id"] == (tmp_path / "run" / "wandb" / "run-id").read_text()
    assert {"seed": 3, "data": {"path": "x"}}.items() <= run["config"]["update"].items()
    first, last = (line for line in capsys.readouterr().err.splitlines() if "offline" in line)
    assert first == last
    assert "no key for https://" in first
    assert f"`wandb sync {piece}` uploads it" in first


@pytest.mark.parametrize(
    ("environment", "settings", "why"),
    [
        ({"WANDB_MODE": "disabled"}, {}, "WANDB_MODE=disabled"),
        ({"WANDB_DISABLED": "true"}, {}, "WANDB_DISABLED=true"),
        ({"WANDB_MODE": "online"}, {"mode": "disabled"}, "monitor.wandb.mode=disabled"),
    ],
)
def test_off_is_off(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    environment: Mapping[str, str],
    settings: Mapping[str, str],
    why: str,
):
    """Case: WANDB_MODE=disabled, WANDB_DISABLED were ignored. W&B is not even imported."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delitem(sys.modules, "wandb")
    start(tmp_path / "run", **settings)
    assert "wandb" not in sys.modules
    assert not (tmp_path / "run" / "wandb").exists()
    assert capsys.readouterr().err == f"wandb: off ({why})\n"


def test_other_ranks_do_not_import_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(sys.modules, "wandb")
    start(tmp_path / "run", is_main=False, mode="offline")
    assert "wandb" not in sys.modules
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize("typed", [pytest.param("offline", marks=SLOW), "disabled"])
def test_what_was_typed_once_is_remembered(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], typed: str
):
    """`wandb offline` and `wandb disabled` write W&B's file of settings."""
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "settings").write_text(f"[default]\nmode = {typed}\n")
    found = pieces(start(tmp_path / "run"))
    assert len(found) == (typed == "offline")
    assert f"`wandb {typed}` was typed here" in capsys.readouterr().err


def test_an_environment_that_wandb_refuses_costs_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("WANDB_MODE", "of")
    start(tmp_path / "run")
    [line] = [line for line in capsys.readouterr().err.splitlines() if "wandb" in line]
    assert line.startswith("warning: wandb: off (W&B refuses its settings: ")


def assert_offline(run_dir: Path, capsys: pytest.CaptureFixture[str], why: str) -> None:
    """A start with a key is offline, with one warning, and its piece is whole."""
    [piece] = pieces(start(run_dir))
    assert_whole(run_dir, piece)
    lines = [line for line in capsys.readouterr().err.splitlines() if "offline" in line]
    assert len(lines) == 2  # at the start and at the end
    assert [line.startswith("warning: ") for line in lines] == [True, False]
    assert why in lines[0]
    assert lines[0] == f"warning: {lines[1]}"
    assert f"`wandb sync {piece}` uploads it" in lines[0]


@pytest.mark.parametrize(
    ("url", "proxy"),
    [
        pytest.param("http://127.0.0.1:{closed}", None, id="closed port"),
        pytest.param("http://127.0.0.1:{silent}", None, id="no answer", marks=SLOW),
        pytest.param("http://no-such-host.invalid", None, id="no such host", marks=SLOW),
        pytest.param("http://w.example", "http://127.0.0.1:{closed}", id="proxy", marks=SLOW),
    ],
)
def test_a_key_and_no_way_to_the_server_is_offline(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    url: str,
    proxy: str | None,
):
    """Case: W&B key there, no network (a compute node)."""
    with closing(socket.socket()) as silent, closing(socket.socket()) as closed:
        closed.bind(("127.0.0.1", 0))
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        ports = {"closed": closed.getsockname()[1], "silent": silent.getsockname()[1]}
        monkeypatch.setenv("WANDB_BASE_URL", url.format(**ports))
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        monkeypatch.setenv("WANDB_HTTP_TIMEOUT", "1")  # 10 by default
        if proxy is not None:
            monkeypatch.setenv("HTTP_PROXY", proxy.format(**ports))
        why = f"{url.format(**ports)} cannot be used: no answer in time"
        assert_offline(tmp_path / "run", capsys, why)


@SLOW
@pytest.mark.parametrize("takes_keys", [False, True], ids=["key", "run"])
def test_a_server_that_refuses_the_key_or_the_run_says_so(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    takes_keys: bool,
):
    with serving(WandbServer()) as server:
        server.takes_keys, server.takes_runs = takes_keys, False
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        monkeypatch.setenv("WANDB_INIT_TIMEOUT", "2")
        assert_offline(tmp_path / "run", capsys, "not logged in")


@SLOW
def test_online_without_a_key_is_offline_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("sys.stdin", None)  # no login prompt
    assert len(pieces(start(tmp_path / "run", mode="online"))) == 1
    assert "warning: wandb: offline (no key for https://" in capsys.readouterr().err


def test_each_start_writes_the_whole_run_and_sets_the_former_aside(tmp_path: Path):
    """Also after a kill: what its piece holds does not matter, not even whether it has one."""
    run_dir = tmp_path / "run"
    [first] = pieces(start(run_dir, last=3))
    [second] = pieces(start(run_dir, first=3, last=6))
    assert_whole(run_dir, second)
    (second / f"run-{run_of(second)['run_id']}.wandb").write_bytes(b"")  # a kill
    [third] = pieces(start(run_dir, first=5, last=8))  # from an earlier checkpoint
    assert_whole(run_dir, third)
    # Of the former ones the last is kept: each holds all that those before it do.
    assert [path.name for path in (run_dir / "wandb" / "former").iterdir()] == [second.name]
    assert not first.exists()
    found = [row["history"]["item"] for row in records(third) if row["type"] == "history"]
    logged = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert found[0]["_timestamp"] == pytest.approx(logged[0]["time"], abs=0.1)
    image = Image.open(third / "files" / history(third)[1]["images/eval.path"])
    assert np.array_equal(np.asarray(image), PIXELS + 1)
    assert np.array_equal(np.asarray(Image.open(run_dir / "images/eval-00000001.png")), PIXELS + 1)


def test_a_run_that_begins_again_at_step_0_repeats_no_record(tmp_path: Path):
    start(tmp_path / "run", first=-1, step=0)
    [piece] = pieces(start(tmp_path / "run", first=-1, step=0))
    assert_whole(tmp_path / "run", piece)
    assert list(history(piece)) == [0, 1, 2, 3]


@SLOW
def test_other_runs_in_a_common_folder_stay_where_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    for name in ("a", "b", "b", "a", "a"):
        root = start(tmp_path / name)
    ids = [run_of(piece)["run_id"] for piece in pieces(root)]
    assert sorted(ids) == sorted((tmp_path / n / "wandb/run-id").read_text() for n in ("a", "b"))
    former = [path.name.rpartition("-")[2] for path in (root / "former").iterdir()]
    assert sorted(former) == sorted(ids)


@SLOW
def test_a_lost_picture_costs_only_that_picture(tmp_path: Path):
    run_dir = tmp_path / "run"
    start(run_dir)
    (run_dir / "images" / "eval-00000002.png").unlink()
    [piece] = pieces(start(run_dir, first=3, last=4))
    assert_whole(run_dir, piece)


def test_how_values_are_shown(tmp_path: Path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    lines = [{"step": 1, "time": 1.0, "data/ledger/epoch": 1, "words": "no number", "list": [1]}]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    [piece] = pieces(start(run_dir, first=1, last=4))
    assert history(piece)[1] == {"data/ledger/epoch": 1}
    metrics = [record["metric"] for record in records(piece) if record["type"] == "metric"]
    hidden = {m.get("name") or m["glob_name"] for m in metrics if m["options"]["hidden"]}
    assert hidden == {"data/order_digest", "data/ledger/*"}
    # The last value stays a number, which a sweep can read; the smallest stands beside it.
    assert summary(piece)["eval/loss"] == 2
    assert summary(piece)["best/eval/loss"] == 0


def test_an_unwritable_wandb_directory_costs_one_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "wandb").write_text("in the way")
    start(tmp_path / "run", mode="offline")
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 6
    assert capsys.readouterr().err.count("W&B failed and is off for the rest of this run") == 1
    shutil.rmtree(tmp_path / "run" / "images")
    assert wandb.run is None
