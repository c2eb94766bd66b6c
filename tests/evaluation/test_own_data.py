"""Trained on one data set and evaluated on others, wherever these lie."""

import json
import os
import re
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.data.index import Index, build_index
from pipeline.data.index.members import MemberRanges
from pipeline.data.index.splits import SplitSpec
from pipeline.data.order.choice import choose
from pipeline.evaluation.trained import evaluate_run
from pipeline.train import main
from pipeline.training.loading import load_run
from tests.data.storage.conftest import nginx, no_proxy, s3, s3_endpoint
from tests.data.storage.fault_server import FaultServer, serving
from tests.launch.runs import outcome, result_of
from tests.processes import Processes
from tests.shards import write_tiny_shards

__all__ = ["nginx", "no_proxy", "s3", "s3_endpoint"]  # fixtures

COUNTS = (9, 14, 2, 25)  # 50 samples
CONFIG = """
run_dir: {folder}/run
data: {{path: {data}, decode: {{kind: image, size: 8}}, threads: 1}}
model: {{backbone: {{kind: mlp, hidden: [4]}}, bottleneck: {{kind: gaussian, size: 2}}}}
objective: {{regularisers: [{{kind: kl}}]}}
batch_size: 8
num_steps: 12
evaluation: {{every_steps: 2, max_samples: 30}}
checkpoint: {{every_steps: 3, keep: {{best: {{metric: eval_ema/val/loss}}}}}}
monitor: {{log_every_steps: 1, num_images: 2, wandb: {{mode: disabled}}}}
"""


@pytest.fixture(scope="module")
def val(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Validation data with shards and a split rule of its own."""
    folder = tmp_path_factory.mktemp("val")
    write_tiny_shards(folder, COUNTS)
    build_index(folder)
    return folder


@pytest.fixture
def config(tmp_path: Path, tiny_shards: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG.format(folder=tmp_path, data=tiny_shards))
    return path


def records(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def evaluations(run: Path) -> dict[int, dict[str, float]]:
    """The figures of each evaluation by step; no step has two."""
    found = [r for r in records(run) if any(name.startswith("eval") for name in r)]
    assert len({record["step"] for record in found}) == len(found)
    return {
        int(record["step"]): {n: v for n, v in record.items() if n.startswith("eval")}
        for record in found
    }


@pytest.mark.slow
def test_evaluated_on_data_of_its_own_in_any_store(
    config: Path, val: Path, tiny_shards: Path, request: pytest.FixtureRequest
):
    """One record per evaluation, with equal figures from everywhere; the best one is theirs."""
    serve: Callable[[Path], str] = request.getfixturevalue("nginx")
    upload: Callable[[Path, str], str] = request.getfixturevalue("s3")
    places = {"local": str(val), "nginx": serve(val), "s3": upload(val, "own data")}
    found: dict[str, dict[int, dict[str, float]]] = {}
    for store, place in places.items():
        sets = f"evaluation.data={{val: {{path: '{place}'}}, part: {{path: {val}, split: train}}}}"
        run = config.parent / store
        assert main([str(config), sets, f"run_dir={run}"]) == 0
        found[store] = evaluations(run)
    assert found["local"] == found["nginx"] == found["s3"]
    metrics = found["local"]
    assert sorted(metrics) == [0, 2, 4, 6, 8, 10, 12]
    for figures in metrics.values():
        assert {name.rpartition("/")[0] for name in figures} == {
            f"{view}/{name}" for view in ("eval", "eval_ema") for name in ("val", "part")
        }
        assert figures["eval/val/samples"] == figures["eval/part/samples"] == 30
        assert figures["eval/val/loss"] != figures["eval/part/loss"]
    losses = {step: it["eval_ema/val/loss"] for step, it in metrics.items() if step}
    run = config.parent / "s3"
    assert load_run(run, step="best").step == min(losses, key=lambda step: losses[step])
    assert (run / "images" / "eval_ema-val-00000012.png").is_file()
    # The same figures afterwards, from the data that the run was evaluated on.
    again = evaluate_run(run, out=config.parent / "card").figures
    assert again == pytest.approx(metrics[12], rel=1e-6)
    # The training's data, if it is named, and not the data of evaluation.data.
    card = evaluate_run(run, data=[str(tiny_shards)], out=config.parent / "trained")
    assert [one["path"] for one in card.identity.data] == [str(tiny_shards)]
    assert [one["split"] for one in card.identity.data] == ["held_out"]
    assert "eval/loss" in card.figures


@pytest.mark.slow
def test_a_single_set_keeps_the_names_and_ends_a_run_that_gets_no_better(config: Path, val: Path):
    best = "checkpoint.keep.best={metric: eval/samples}"  # the first is never surpassed
    settings = (f"evaluation.data={{path: {val}}}", best, "evaluation.patience=2")
    assert main([str(config), *settings]) == 0
    run = config.parent / "run"
    assert outcome(run)["step"] == 6
    assert "evaluation.patience" in outcome(run)["message"]
    assert evaluations(run)[6]["eval/samples"] == 30
    assert not any(name.count("/") > 1 for it in evaluations(run).values() for name in it)


@pytest.mark.slow
def test_the_same_samples_whatever_the_batch_and_the_seed(config: Path, val: Path):
    """Their squared error before training differs by the weights; the samples by nothing."""
    found: list[tuple[list[str], float]] = []
    for number, settings in enumerate([(), ("batch_size=6",), ("batch_size=30", "data.lanes=3")]):
        run = config.parent / str(number)
        sets = (f"evaluation.data={{val: {{path: {val}}}}}", f"run_dir={run}", "num_steps=1")
        shown = "monitor.num_images=30"
        assert main([str(config), *sets, *settings, shown]) == 0
        sheet = json.loads((run / "images" / "eval-val-00000000.json").read_text())
        keys = [entry["key"] for entry in sheet["pictured"]]
        found.append((keys, evaluations(run)[0]["eval/val/squared_error"]))
    index = Index.open(val)
    shard, row = choose(index.counts("all"), 30, f"{index.dataset_id}/all")
    chosen = {index.table(s).keys()[r] for s, r in zip(shard.tolist(), row.tolist(), strict=True)}
    for keys, error in found:
        assert set(keys) == chosen
        assert keys == found[0][0]
        assert error == pytest.approx(found[0][1], rel=1e-6)


@pytest.mark.slow
def test_data_that_moved_is_found_and_other_data_is_refused(
    config: Path, val: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "old").mkdir()
    folder = Path(shutil.copytree(val, tmp_path / "old" / "val"))
    sets = f"evaluation.data={{val: {{path: {folder}}}}}"
    assert main([str(config), sets, "num_steps=2", f"run_dir={tmp_path}/old/run"]) == 0
    # Run and data move together: the data is found from the run.
    (tmp_path / "old").rename(tmp_path / "new")
    capsys.readouterr()
    assert main([str(config), sets, "num_steps=4", f"run_dir={tmp_path}/new/run"]) == 0
    assert f"data: {folder} of {tmp_path}/new/run is read from" in capsys.readouterr().err
    assert "eval/val/loss" in evaluate_run(tmp_path / "new" / "run", out=tmp_path / "c").figures
    (tmp_path / "new" / "run").rename(tmp_path / "run")
    moved = (tmp_path / "new" / "val").rename(tmp_path / "moved")
    capsys.readouterr()
    assert main([str(config), sets]) == 2
    text = capsys.readouterr().err
    assert f"The data set that {tmp_path}/run was evaluated on (id " in text
    assert "evaluation.data.val.path=PATH" in text
    elsewhere = sets.replace(str(folder), str(moved))
    assert main([str(config), elsewhere, "num_steps=6"]) == 0
    assert sorted(evaluations(tmp_path / "run")) == [0, 2, 4, 6]
    write_tiny_shards(tmp_path / "other", (20, 20))
    build_index(tmp_path / "other")
    other = sets.replace(str(folder), str(tmp_path / "other"))
    capsys.readouterr()
    assert main([str(config), other]) == 2
    text = capsys.readouterr().err
    assert f"evaluation.data.val: {tmp_path}/other is another data set than the one" in text
    assert "--accept-change=evaluation.data.val" in text
    assert main([str(config), other, "num_steps=7", "--accept-change=evaluation.data.val"]) == 0
    assert main([str(config), other, "evaluation.max_samples=20", "num_steps=8"]) == 2
    assert "evaluation.max_samples: there 30, now 20" in capsys.readouterr().err


def served(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def range_of(index: Index, shard: int, row: int) -> tuple[int, int]:
    ranges: MemberRanges = index.table(shard).ranges_of(("png",))
    return int(ranges.offset[row]), int(ranges.num_bytes[row])


@pytest.mark.distributed
def test_requests_of_four_processes_by_the_log_of_the_server(
    config: Path, val: Path, run_processes: Callable
):
    """Of two evaluations, each with two views: every chosen sample is fetched once in each."""
    with serving(FaultServer(served(val))) as server:
        sets = f"evaluation.data={{val: {{path: {server.url}}}}}"
        settings = ("num_steps=1", "evaluation.every_steps=1", "monitor.num_images=0")
        result = run_processes("pipeline.train", 4, config, sets, *settings)
        assert result.code == 0, result.output
        asked = [r for r in server.requests if r.method == "GET"]
    requests = Counter(request.path for request in asked)
    print(dict(sorted(requests.items())))
    index = Index.open(val)
    shard, row = choose(index.counts("all"), 30, f"{index.dataset_id}/all")
    needed = Counter[tuple[str, int]]()
    for one in asked:
        if not one.path.endswith(".tar"):
            continue
        first, last = map(int, one.headers["range"].removeprefix("bytes=").split("-"))
        for s, r in zip(shard.tolist(), row.tolist(), strict=True):
            offset, num_bytes = range_of(index, s, r)
            if index.shards[s].name == one.path and first <= offset <= last:
                assert offset + num_bytes - 1 <= last
                needed[one.path, offset] += 1
    of_shards = sum(number for path, number in requests.items() if path.endswith(".tar"))
    assert of_shards <= 2 * 30
    assert len(needed) == 30
    assert requests["index/manifest.json"] == 4
    tables = [number for path, number in requests.items() if path.endswith(".arrow")]
    assert max(tables) <= 4  # a process keeps a table between evaluations


def num_read(server: FaultServer) -> int:
    return sum(one.method == "GET" and one.path.endswith(".tar") for one in list(server.requests))


@pytest.mark.fault
@pytest.mark.distributed
def test_killed_and_stopped_in_an_evaluation_it_ends_with_the_same_bits(
    config: Path, val: Path, start_processes: Callable[..., Processes]
):
    with serving(FaultServer(served(val))) as server:
        sets = f"evaluation.data={{val: {{path: {server.url}}}, part: {{path: {val}}}}}"
        settings = (sets, "num_steps=12", "monitor.num_images=0", "evaluation.max_samples=40")
        start = ("pipeline.train", 2, config, *settings)
        reference, run = config.parent / "reference", config.parent / "run"
        ended = start_processes(*start, f"run_dir={reference}").wait(180)
        assert ended.code == 0, ended.output
        server.seconds_per_answer = 0.5
        for signal_sent in (signal.SIGKILL, signal.SIGTERM):
            running = start_processes(*start)
            running.wait_for("/12 ", timeout=120)
            before = num_read(server)
            while num_read(server) == before:  # the server still holds the answer back
                assert running.running, running.output
                time.sleep(0.005)
            done = len(evaluations(run))
            if signal_sent == signal.SIGKILL:
                running.kill()
            else:
                os.kill(running.pid, signal_sent)
                assert running.wait(60).code != 0
                assert outcome(run)["status"] == "preempted"
            assert len(evaluations(run)) == done
        server.seconds_per_answer = 0.0
        ended = start_processes(*start).wait(180)
        assert ended.code == 0, ended.output
    assert result_of(run, 12) == result_of(reference, 12)
    assert evaluations(run) == evaluations(reference)
    assert load_run(run, step="best").step == load_run(reference, step="best").step


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("evaluation.data={path: {val}, split: nope}", "evaluation.data.split = 'nope': the index"),
        (
            "evaluation.data={a: {path: {val}, split: 'x-*'}}",
            "evaluation.data.a.split = 'x-*' matches none of the 4 shards of {val}, such as tiny-",
        ),
        ("evaluation.data={path: {val}, split: empty}", "evaluation.data.split = 'empty' holds no"),
        ("evaluation.data={a: {path: {val}/index}}", "evaluation.data.a: {val}/index/index/manif"),
        ("evaluation.data={a: {path: /nowhere}}", "evaluation.data.a: /nowhere does not exist"),
        ("evaluation.data={a: {path: {val}, shards: /no}}", "/no/tiny-0000.tar is missing"),
        ("evaluation.max_samples=0", "evaluation.max_samples: must be greater than 0 (got 0)"),
        ("evaluation.data={A-b: {path: {val}}}", "'A-b' is no name of a data set"),
        ("evaluation.data={'': {path: {val}}}", "'' is no name of a data set"),
        ("evaluation.data={}", "data names no data set"),
        ("evaluation.data={a: {}}", "evaluation.data.a.path: required, but not given"),
        ("evaluation.data={path: {val}, spilt: all}", 'spilt: unknown key (got "all"); did you'),
        ("evaluation.data=3", "evaluation.data: must be a mapping (got 3)"),
        ("evaluation={data: {path: {val}}, split: train}", "split train is of the training's data"),
        (
            "evaluation.data={a: {path: {val}}, b: {path: {val}}} "
            "checkpoint.keep.best={metric: eval/loss} evaluation.patience=2",
            "checkpoint.keep.best.metric eval/loss is of no data set that evaluation.data names: "
            "choose eval/a/loss, eval/b/loss",
        ),
        (
            "evaluation.data={a: {path: {val}}} checkpoint.keep.best={metric: eval/c/loss}",
            "checkpoint.keep.best.metric eval/c/loss is of no data set",
        ),
        (
            "checkpoint.keep.best={metric: eval/a/loss}",
            "checkpoint.keep.best.metric eval/a/loss is of a data set a, but evaluation.data names",
        ),
    ],
)
def test_mistakes_are_refused_before_anything_is_written(
    config: Path, val: Path, capsys: pytest.CaptureFixture[str], settings: str, message: str
):
    folder = Path(shutil.copytree(val, config.parent / "val"))
    build_index(folder, split=SplitSpec(fractions={"train": 1 - 1e-12, "empty": 1e-12}))
    before = sorted(config.parent.rglob("*"))
    given = [f"{word}" for word in re.split(r" (?=\w+\.[\w.]+=)", settings)]
    best = "checkpoint.keep.best=null"
    words = [str(config), best, *(word.replace("{val}", str(folder)) for word in given)]
    last = {word.partition("=")[0]: word for word in words[1:]}
    assert main([str(config), *last.values()]) == 2
    printed = capsys.readouterr()
    assert message.replace("{val}", str(folder)) in printed.err
    assert "Traceback" not in printed.err
    assert "problem" not in printed.err or "1 problem:" in printed.err
    assert sorted(config.parent.rglob("*")) == before
