"""Which settings a resume may change: freely, by --accept-change, or never."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.checkpoints.folder import list_checkpoints, read_state
from pipeline.data.index import Index, build_index
from pipeline.data.index.splits import SplitSpec
from pipeline.export.model import export_model
from pipeline.train import main
from pipeline.training.loading import load_config
from tests.data.storage.fault_server import FaultServer, serving
from tests.shards import write_tiny_shards

SPLIT = SplitSpec(fractions={"train": 0.75, "held_out": 0.25})


def write_config(folder: Path, data: Path) -> Path:
    path = folder / "config.yaml"
    path.write_text(
        f"run_dir: {folder / 'run'}\n"
        f"data: {{path: {data}, decode: {{kind: image, size: 8, channels: 3}}}}\n"
        "model: {backbone: {kind: mlp, hidden: [8]}}\n"
        "batch_size: 12\n"
        "num_steps: 2\n"
        "monitor: {num_images: 0, wandb: {mode: disabled}}\n"
    )
    return path


@pytest.fixture(scope="module")
def finished(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a config and the run of its two steps."""
    folder = tmp_path_factory.mktemp("finished")
    assert main([str(write_config(folder, tiny_shards))]) == 0
    return folder


@pytest.fixture
def resume(
    finished: Path, tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """Resume a copy of the run with more arguments; return exit code and errors."""
    config = write_config(tmp_path, tiny_shards)
    shutil.copytree(finished / "run", tmp_path / "run")

    def run(*arguments: str) -> tuple[int, str]:
        capsys.readouterr()
        code = main([str(config), *arguments])
        return code, capsys.readouterr().err

    return run


def content(run: Path) -> dict[str, bytes]:
    return {str(p.relative_to(run)): p.read_bytes() for p in run.rglob("*") if p.is_file()}


def newest_step(run: Path) -> int:
    return read_state(list_checkpoints(run / "checkpoints")[0]).step


def test_the_command_of_a_finished_run_does_nothing(resume: Callable, tmp_path: Path):
    before = content(tmp_path / "run")
    code, errors = resume()
    told, done = errors.splitlines()
    assert (code, done) == (0, "done at step 2")
    assert told.startswith("wandb: off")
    after = content(tmp_path / "run")
    differing = {name for name in before | after if before.get(name) != after.get(name)}
    assert differing <= {"config.yaml", "locations.json"}  # they name the copy


@pytest.mark.parametrize(
    "change",
    [
        "monitor.wandb.tags=[a]",
        "accumulation=2",
        "monitor.log_every_steps=1",
        "checkpoint.every_steps=1",
        "checkpoint={every_steps: 3, keep: {latest: 5}}",
        "evaluation.every_steps=1",
        "data.threads=1",
    ],
)
def test_a_lawful_change_needs_no_word(resume: Callable, tmp_path: Path, change: str):
    code, errors = resume("num_steps=4", change)
    assert code == 0, errors
    assert newest_step(tmp_path / "run") == 4
    assert not (tmp_path / "run/changes.jsonl").exists()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("seed=1", "seed: there 0, now 1"),
        ("optimizer.learning_rate.peak=0.5", "optimizer.learning_rate.peak: there 0.001, now 0.5"),
        ("ema_decay=null", "ema_decay: there 0.999, now None"),
        ("data.window=3", "data.window: there 256, now 3"),
        ("batch_size=6", "batch_size: there 12, now 6"),
        ("model.bottleneck.size=3", "model.bottleneck.size: there 10, now 3"),
        ("precision=fp64", "precision: there 'fp32', now 'fp64'"),
    ],
    ids=lambda value: value.split("=")[0],
)
def test_any_other_change_is_refused_with_both_values_before_anything_is_written(
    resume: Callable, tmp_path: Path, change: str, told: str
):
    before = content(tmp_path / "run")
    code, errors = resume("num_steps=4", change)
    assert code == 2
    assert f"  {told}\n" in errors
    assert f"--accept-change={told.split(':')[0]}" in errors
    assert "Traceback" not in errors
    assert content(tmp_path / "run") == before


def test_all_refused_changes_are_told_at_once_and_accepting_one_is_not_enough(resume: Callable):
    code, errors = resume("seed=1", "max_skipped_steps=5", "--accept-change", "max_skipped_steps")
    assert code == 2
    assert "seed: there 0" in errors
    assert "max_skipped_steps" not in errors
    code, errors = resume("seed=1", "max_skipped_steps=5")
    words = {"--accept-change=seed", "--accept-change=max_skipped_steps"}
    assert set(errors.splitlines()[-1].split()[-2:]) == words


def test_an_accepted_change_is_made_and_recorded(resume: Callable, tmp_path: Path):
    change = ("optimizer.learning_rate.peak=0.5", "num_steps=4")
    code, errors = resume(*change, "--accept-change", "optimizer.learning_rate")
    assert code == 0, errors
    run = tmp_path / "run"
    assert newest_step(run) == 4
    records = [json.loads(line) for line in (run / "changes.jsonl").read_text().splitlines()]
    path = "optimizer.learning_rate.peak"
    assert records == [{"checkpoint": "step-2", "path": path, "left": 0.001, "right": 0.5}]
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rates = {r["step"]: r["optim/learning_rate"] for r in logged if "optim/learning_rate" in r}
    assert rates[4] > 100 * rates[2] > 0

    assert resume(*change)[0] == 0  # now it is the run's setting
    assert resume("num_steps=4")[0] == 2


@pytest.mark.parametrize(
    "change",
    ["model.bottleneck.size=6", "model.backbone={kind: mlp, hidden: [9]}", "data.decode.size=16"],
    ids=lambda value: value.split("=")[0],
)
def test_no_word_helps_against_weights_of_another_shape(
    resume: Callable, tmp_path: Path, change: str
):
    before = content(tmp_path / "run")
    what = change.split("=")[0]
    code, errors = resume(change, "num_steps=4", f"--accept-change={what}")
    assert code == 2
    told = f"{tmp_path}/run/checkpoints/step-2 holds weights of another model than the changed"
    assert told in errors
    assert content(tmp_path / "run") == before
    assert resume("num_steps=4")[0] == 0


def test_no_word_helps_against_another_order_of_samples(resume: Callable, tmp_path: Path):
    before = content(tmp_path / "run")
    code, errors = resume("seed=1", "num_steps=4", "--accept-change", "seed")
    assert code == 2
    assert "was trained on another order of samples" in errors
    assert content(tmp_path / "run") == before  # so the former command still resumes
    assert resume("num_steps=4")[0] == 0


def test_another_data_set_in_the_same_place_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    data = tmp_path / "data"
    write_tiny_shards(data, counts=(30, 20))
    build_index(data, split=SPLIT)
    config = write_config(tmp_path, data)
    assert main([str(config)]) == 0
    first = data.rename(tmp_path / "first")
    write_tiny_shards(data, counts=(30, 21))
    build_index(data, split=SPLIT)
    capsys.readouterr()
    assert main([str(config), "num_steps=4"]) == 2
    errors = capsys.readouterr().err
    assert "was trained on another data set (id " in errors
    run = tmp_path / "run"
    assert errors.endswith(f"the same command with run_dir={run}-2 init_from={run}\n")
    assert newest_step(run) == 2

    # The same set, grown and elsewhere, is no setting that could be accepted, either.
    grown = Path(shutil.move(data, tmp_path / "grown"))
    assert main([str(config), "num_steps=4", f"data.path={grown}"]) == 2
    errors = capsys.readouterr().err
    assert "was trained on another data set (id " in errors
    assert "--accept-change" not in errors
    there, here = re.search(r"\(id (\w+), now (\w+)\)", errors).groups()
    anew = errors.split("the same command with ")[1].split()
    assert main([str(config), f"data.path={grown}", *anew]) == 0
    printed = capsys.readouterr().err
    assert f"starts from {run}: run at step 2, averaged weights, sha256 " in printed
    counts = [f"{int(Index.open(path).counts('train').sum())} samples" for path in (first, grown)]
    told = f"trained on another data set ({there}, {counts[0]}) than this run ({here}, {counts[1]})"
    assert told in printed
    assert newest_step(tmp_path / "run-2") == 2
    # So does a start from the model alone, which knows the id of its data.
    export_model(run, tmp_path / "model")
    more = (f"run_dir={tmp_path / 'run-3'}", f"init_from={tmp_path / 'model'}")
    assert main([str(config), f"data.path={grown}", *more]) == 0
    told = f"trained on another data set ({there}) than this run ({here}, {counts[1]})"
    assert told in capsys.readouterr().err


def test_a_moved_data_set_is_the_same_one(resume: Callable, tmp_path: Path, tiny_shards: Path):
    """The run goes on without a word, reads from there, and keeps the place in its config."""
    moved = tmp_path / "moved"
    shutil.copytree(tiny_shards, moved)
    code, errors = resume(f"data.path={moved}", "num_steps=4")
    assert code == 0, errors
    run = tmp_path / "run"
    assert newest_step(run) == 4
    assert load_config(run).data.path == str(moved)
    assert not (run / "changes.jsonl").exists()
    apart = tmp_path / "apart"
    shutil.copytree(moved / "index", apart / "index")
    code, errors = resume(f"data.path={apart}", f"data.shards={moved}", "num_steps=5")
    assert code == 0, errors
    assert newest_step(run) == 5


def test_a_moved_data_set_is_known_before_the_first_checkpoint(
    resume: Callable, tmp_path: Path, tiny_shards: Path
):
    """By locations.json; runs of 93dd2d6 have none, so there it is a change."""
    run = tmp_path / "run"
    shutil.rmtree(run / "checkpoints")
    moved = shutil.copytree(tiny_shards, tmp_path / "moved")
    other = tmp_path / "other"
    write_tiny_shards(other, counts=(30, 20))
    build_index(other, split=SPLIT)
    code, errors = resume(f"data.path={other}")
    assert code == 2
    assert f"data.path: there '{tiny_shards}', now '{other}'" in errors
    code, errors = resume(f"data.path={moved}")
    assert code == 0, errors
    shutil.rmtree(run / "checkpoints")
    (run / "locations.json").unlink()
    code, errors = resume()
    assert code == 2
    assert f"data.path: there '{moved}', now '{tiny_shards}'" in errors


def test_a_data_set_may_move_behind_a_url(
    resume: Callable, tmp_path: Path, tiny_shards: Path, monkeypatch: pytest.MonkeyPatch
):
    """Index and shards, or the shards alone."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    paths = [path for path in tiny_shards.rglob("*") if path.is_file()]
    files = {f"set/{path.relative_to(tiny_shards)}": path.read_bytes() for path in paths}
    with serving(FaultServer(files)) as server:
        for step, place in ((3, "data.path"), (4, "data.shards")):
            code, errors = resume(f"{place}={server.url}/set", f"num_steps={step}")
            assert code == 0, errors
            assert newest_step(tmp_path / "run") == step
            assert not (tmp_path / "run/changes.jsonl").exists()
    assert load_config(tmp_path / "run").data.shards == f"{server.url}/set"
