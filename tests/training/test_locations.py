"""A run, its data or both have moved: the data is found by its id, and nothing else is taken."""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path

import pytest

import latentmill as lm
from pipeline.__main__ import main as latentmill
from pipeline.checkpoints.folder import list_checkpoints, read_state
from pipeline.common import strict
from pipeline.common.errors import UserError
from pipeline.config import TrainConfig
from pipeline.data.index import Index, build_index
from pipeline.data.index.splits import SplitSpec
from pipeline.evaluation.exported import probe_export
from pipeline.evaluation.request import EvaluationRequest
from pipeline.evaluation.trained import evaluate_run
from pipeline.export.model import export_model
from pipeline.train import main, train
from pipeline.training.loading import load_config
from tests.config.runs import BASE
from tests.export.world import damage_sample, make_config, run_export
from tests.shards import write_tiny_shards

SPLIT = SplitSpec(fractions={"train": 0.75, "held_out": 0.25})


@dataclass(frozen=True)
class Home:
    """A folder with `run.yaml`, `data` and `runs/a`, where the run was trained by these paths."""

    folder: Path  # where it was trained; nothing is there any more
    kept: Path  # where it is kept, to be copied
    metrics: Mapping[str, float]  # of its evaluation there

    @property
    def dataset_id(self) -> str:
        return Index.open(self.kept / "data").dataset_id

    def copied(self, to: Path) -> Path:
        return Path(shutil.copytree(self.kept, to))


@pytest.fixture(scope="module")
def home(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Home:
    folder = tmp_path_factory.mktemp("home") / "began"
    shutil.copytree(tiny_shards, folder / "data")
    settings = {**BASE, "run_dir": "runs/a", "data": {**BASE["data"], "path": "data"}}
    (folder / "run.yaml").write_text(json.dumps(settings))
    with chdir(folder):
        assert main(["run.yaml"]) == 0
        metrics = evaluate_run(Path("runs/a")).figures
    return Home(folder, folder.rename(folder.with_name("kept")), metrics)


@pytest.fixture
def at_home(home: Home) -> Iterator[Path]:
    """Home, where it was trained."""
    home.kept.rename(home.folder)
    yield home.folder
    home.folder.rename(home.kept)


def refused(run: Path, **places: list[str]) -> str:
    with pytest.raises(UserError) as caught:
        evaluate_run(run, **places)
    return str(caught.value)


def newest_step(run: Path) -> int:
    return read_state(list_checkpoints(run / "checkpoints")[0]).step


def other_data(folder: Path) -> str:
    """Write another data set, and return its id."""
    write_tiny_shards(folder, counts=(30, 31))
    return build_index(folder, split=SPLIT).dataset_id


def test_a_run_whose_folder_and_data_both_moved_is_evaluated(
    home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    moved = home.copied(tmp_path / "elsewhere" / "project")
    assert evaluate_run(moved / "runs/a").figures == home.metrics
    told = f"data: data of {moved}/runs/a is read from {moved}/data\n"
    assert capsys.readouterr().err.count(told) == 1
    assert latentmill(["evaluate", str(moved / "runs/a"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out).items() >= home.metrics.items()


def test_a_run_whose_folder_and_data_both_moved_goes_on(
    home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """From another folder, by the same file; the run's config then names the new place."""
    moved = home.copied(tmp_path / "project")
    monkeypatch.chdir(tmp_path)
    command = [str(moved / "run.yaml"), f"run_dir={moved}/runs/a", "num_steps=5"]
    assert main([*command, "--dry-run"]) == 0
    assert "num_steps: 5" in capsys.readouterr().out
    assert main(command) == 0
    assert capsys.readouterr().err.count(f"runs/a is read from {moved}/data\n") == 1
    assert newest_step(moved / "runs/a") == 5
    assert load_config(moved / "runs/a").data.path == f"{moved}/data"
    assert not (moved / "runs/a/changes.jsonl").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["project"]


@pytest.mark.slow
def test_doctor_finds_it_too(home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    moved = home.copied(tmp_path / "project")
    latentmill(["doctor", str(moved / "run.yaml"), f"run_dir={moved}/runs/a", "--json"])
    findings = json.loads(capsys.readouterr().out)["findings"]
    told = {f"data: data of {moved}/runs/a is read from {moved}/data"}
    told |= {f"{moved}/data: 60 samples in 5 shards"}
    assert told == {f["text"] for f in findings if (f["check"], f["verdict"]) == ("index", "ok")}
    shutil.rmtree(moved / "data")
    assert latentmill(["doctor", str(moved / "run.yaml"), f"run_dir={moved}/runs/a"]) == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "index   " in line]
    assert line.startswith("FAIL")
    assert home.dataset_id in line
    assert "latentmill index" not in line


def test_a_run_whose_folder_and_data_both_moved_is_exported(
    home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    moved = home.copied(tmp_path / "project")
    assert run_export(make_config(moved / "runs/a", tmp_path / "latents")) == 0
    assert f"runs/a is read from {moved}/data\n" in capsys.readouterr().err
    manifest = json.loads((tmp_path / "latents/manifest.json").read_bytes())
    assert manifest["fingerprint"]["data"]["dataset_id"] == home.dataset_id
    argv = ["verify", str(tmp_path / "latents"), "--run", str(moved / "runs/a")]
    assert latentmill(argv) == 0
    other = other_data(tmp_path / "other")
    with pytest.raises(
        UserError, match=rf"{other}, but the export was made from {home.dataset_id}"
    ):
        probe_export(tmp_path / "latents", source=f"file://{tmp_path}/other")
    shutil.move(moved / "data", tmp_path / "far")
    with pytest.raises(UserError, match=r"data.path=PATH; it must be the same data set"):
        run_export(make_config(moved / "runs/a", tmp_path / "again"))
    assert not (tmp_path / "again").exists()
    there = {"path": str(tmp_path / "far")}
    assert run_export(make_config(moved / "runs/a", tmp_path / "again", data=there)) == 0


def test_a_run_that_moved_alone_finds_its_data_where_it_was_trained(at_home: Path, tmp_path: Path):
    run = Path(shutil.copytree(at_home / "runs/a", tmp_path / "b"))
    assert evaluate_run(run).step == 4
    assert main([str(at_home / "run.yaml"), f"run_dir={run}", "num_steps=5"]) == 0
    assert load_config(run).data.path == str(at_home / "data")


def test_without_its_data_a_run_is_loaded_and_its_model_exported(home: Home, tmp_path: Path):
    run = home.copied(tmp_path / "project") / "runs/a"
    shutil.rmtree(tmp_path / "project/data")
    link = tmp_path / "link"
    link.symlink_to(run)
    model = lm.load(link)
    export_model(run, tmp_path / "model")
    other = lm.load((tmp_path / "model").rename(tmp_path / "moved"))
    assert model.latent_shape == other.latent_shape
    assert model.module.state_dict().keys() == other.module.state_dict().keys()


@pytest.mark.parametrize("elsewhere", ["nothing", "another data set"])
def test_what_is_not_found_is_told_with_its_id_and_without_a_second_index(
    home: Home, tmp_path: Path, elsewhere: str
):
    run = home.copied(tmp_path / "project") / "runs/a"
    shutil.move(tmp_path / "project/data", tmp_path / "scratch")
    other = other_data(tmp_path / "project/data") if elsewhere != "nothing" else "no index there"
    text = refused(run)
    assert f"(id {home.dataset_id}) is not found; looked at: data (no index there), " in text
    assert f"{home.folder}/data (no index there), " in text
    assert f"{tmp_path}/project/data (" in text
    assert other in text
    assert "by --data PATH; it must be the same data set" in text
    assert "latentmill index" not in text
    assert evaluate_run(run, data=[str(tmp_path / "scratch")]).figures == home.metrics


def test_only_the_same_data_set_is_taken(
    home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Not another one that the paths lead to by chance; one that a person names is told."""
    run = home.copied(tmp_path / "project") / "runs/a"
    other = other_data(tmp_path / "here/data")
    with chdir(tmp_path / "here"):
        assert evaluate_run(run).figures == home.metrics
        capsys.readouterr()
        card = evaluate_run(run, data=["data"])
    (data,) = card.identity.data
    assert (data["dataset_id"], data["split"], data["samples"]) == (other, "all", 61)
    told = f"data: data is another data set than the one that {run} was trained on"
    assert told in capsys.readouterr().err
    assert "looked at: nowhere (no index there). Name" in refused(run, data=["nowhere"])


@pytest.mark.slow
def test_index_and_shards_may_lie_apart_and_move_each_by_itself(
    home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = home.copied(tmp_path / "project") / "runs/a"
    shards, index = tmp_path / "shards", tmp_path / "index-alone"
    shutil.copytree(tmp_path / "project/data/index", index / "index")
    shutil.move(tmp_path / "project/data", shards)
    assert evaluate_run(run, data=[str(index)], shards=[str(shards)]).figures == home.metrics
    text = refused(run, data=[str(index)])
    assert f"tiny-0000.tar is in none of {index}. Put them back" in text
    assert text.endswith("by --shards PATH.")
    # The index rebuilt elsewhere is the same one; by another rule, it is said.
    rebuilt = tmp_path / "rebuilt"
    assert build_index(shards, out=rebuilt, split=SPLIT).dataset_id == home.dataset_id
    places = ["--data", str(rebuilt), "--shards", str(shards)]
    capsys.readouterr()
    assert latentmill(["evaluate", str(run), "--json", *places]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out).items() >= home.metrics.items()
    assert "another rule" not in printed.err
    build_index(shards, out=rebuilt, split=SplitSpec(fractions={"train": 0.5, "held_out": 0.5}))
    assert latentmill(["evaluate", str(run), *places]) == 0
    assert "divides the data by another rule than the one in the training" in (
        capsys.readouterr().err
    )


@pytest.mark.slow
def test_shards_of_their_own_move_along_with_the_run(home: Home, tmp_path: Path):
    """`data.shards` is looked for as `data.path` is; so is a place that is written as a URL."""
    began = tmp_path / "began"
    shutil.copytree(home.kept / "data", began / "raw")
    shutil.move(began / "raw/index", began / "index/index")
    with chdir(began):
        places = ["data.path=index", "data.shards=raw", "run_dir=run"]
        assert main([str(home.kept / "run.yaml"), *places]) == 0
    moved = began.rename(tmp_path / "moved")
    assert evaluate_run(moved / "run").figures == home.metrics
    with chdir(moved):  # where the paths lead to the data again, they stay
        assert main([str(home.kept / "run.yaml"), *places, "num_steps=5"]) == 0
        assert load_config(Path("run")).data.shards == "raw"


@pytest.mark.parametrize("what", ["without locations.json", "half of locations.json", "by a link"])
def test_other_ways_to_keep_a_run(home: Home, tmp_path: Path, what: str):
    """93dd2d6 wrote no locations.json: then what the config says moves along with the run."""
    run = home.copied(tmp_path / "project") / "runs/a"
    if what == "without locations.json":
        (run / "locations.json").unlink()
    elif what == "half of locations.json":
        (run / "locations.json").write_bytes((run / "locations.json").read_bytes()[:40])
    else:
        (tmp_path / "newest").symlink_to(run)
        run = tmp_path / "newest"
    assert evaluate_run(run).figures == home.metrics


@pytest.mark.slow
def test_the_data_sets_of_a_mixture_are_found_one_by_one(home: Home, tmp_path: Path):
    began = tmp_path / "began"
    shutil.copytree(home.kept / "data", began / "a")
    other_data(began / "b")
    entries = [{"path": "a"}, {"path": "b", "weight": 3}]
    settings = {**BASE, "run_dir": "run", "data": {**BASE["data"], "mixture": entries}}
    (began / "run.yaml").write_text(json.dumps(settings))
    with chdir(began):
        assert main(["run.yaml"]) == 0
        metrics = evaluate_run(Path("run")).figures
    moved = began.rename(tmp_path / "moved")
    a, b, run = str(moved / "a"), str(moved / "b"), moved / "run"
    assert evaluate_run(run).figures == metrics
    (run / "locations.json").rename(tmp_path / "locations.json")
    assert evaluate_run(run).figures == metrics  # as of 93dd2d6: by the id of both together
    assert "on other data sets (id " in refused(run, data=[b, a])
    (tmp_path / "locations.json").rename(run / "locations.json")
    b = str(shutil.move(b, tmp_path / "b"))
    assert evaluate_run(run, data=[a, b]).figures == metrics
    assert "give --data PATH 2 times, in their order, not 1 times" in refused(run, data=[b])
    assert f"looked at: {b} (data set " in refused(run, data=[b, a])
    with chdir(moved):
        assert main(["run.yaml", f"data.mixture.1.path={b}", "num_steps=5"]) == 0
        assert [source.path for source in load_config(Path("run")).data.sources] == ["a", b]


def test_a_run_that_may_only_be_read_is_evaluated(
    tiny_shards: Path, small_disk, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Also if its data was damaged since, and samples cannot be listed in the run."""
    disk, data = small_disk("2m"), Path(shutil.copytree(tiny_shards, tmp_path / "data"))
    places = (f"run_dir={disk / 'run'}", f"data.path={data}", "num_steps=1")
    assert train(strict.load(TrainConfig, None, places, text=json.dumps(BASE))) == 0
    (disk / "run/quarantine.jsonl").write_text('{"half": ')  # as a kill leaves it
    damage_sample(data, "tiny-0001.tar", 3)
    small_disk("2m", "ro")
    capsys.readouterr()
    assert (
        evaluate_run(disk / "run", request=EvaluationRequest(split="all")).figures[
            "eval/tombstones"
        ]
        == 1
    )
    printed = capsys.readouterr().err
    assert f"{disk}/run/quarantine.jsonl cannot be written to (Read-only file system)" in printed
    assert '"shard": "tiny-0001.tar"' in printed
