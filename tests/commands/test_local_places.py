"""Where only a directory works, what is none is refused everywhere, and nothing is written."""

import json
from pathlib import Path

import pytest

import latentmill as lm
from launch.__main__ import main as launch
from pipeline.__main__ import main
from pipeline.commands.doctor.diagnose import diagnose
from pipeline.common.errors import UserError
from pipeline.data.index import Index
from pipeline.train import main as train

NO_DIRECTORY = {
    "s3://bucket/runs/a": "not a URL",
    "gs://bucket/a": "not a URL",
    "S3:/bucket/a": "not a URL",  # what is left of s3:// in a `Path`
    "hf://datasets/me/a": "not a URL",
    "file:///runs/a b": "must be written without file://, as /runs/a b",
    "~/runs/a": "must be written out, as {home}/runs/a: only a shell expands ~ and $NAME",
    "~nobody-here/a": "must be written out: only a shell expands ~",
    "$HOME/runs/a": "must be written out, as {home}/runs/a: only a shell expands ~ and $NAME",
    "runs/${NOT_SET_HERE}": "must be written out: only a shell expands ~ and $NAME",
    "''": "must name a directory",
    "'  '": "must name a directory",
    "a-file": "must be a directory, and a-file is a file",
    "a-file/runs/a": "must be a directory, and a-file is a file",
}
URL = "s3://bucket/a"


@pytest.fixture
def config(tmp_path: Path, tiny_shards: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A config in the current folder, beside a file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "a-file").touch()
    decode = {"kind": "image", "size": 32}
    settings = {"run_dir": "run", "data": {"path": str(tiny_shards), "decode": decode}}
    (tmp_path / "run.yaml").write_text(json.dumps(settings))
    return tmp_path / "run.yaml"


def check_nothing_written(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["a-file", "run.yaml"]


@pytest.mark.parametrize("place", NO_DIRECTORY)
def test_a_run_dir_that_is_no_directory_is_refused_by_every_start(
    config: Path, tmp_path: Path, place: str, capsys: pytest.CaptureFixture[str]
):
    reason = NO_DIRECTORY[place].format(home=tmp_path / "home")
    given = f"run_dir={place}"
    for option in (["--dry-run"], ["--check"], []):
        assert train([str(config), given, *option]) == 2
        assert f"run_dir: {reason}" in capsys.readouterr().err.replace(
            "must be a path of this machine or of a mounted file system, ", ""
        )
    with pytest.raises(UserError, match="run_dir"):
        lm.TrainConfig(run_dir=place.strip("'"), data={"path": "d"})
    check_nothing_written(tmp_path)


@pytest.mark.parametrize("place", [URL, "~/runs/a", "a-file/a"])
def test_so_it_is_by_clusters_and_doctor(
    config: Path, tmp_path: Path, place: str, capsys: pytest.CaptureFixture[str]
):
    pod = ["--image", "registry.example/latentmill:1", "--claim", "mill"]
    for verb in (["slurm"], ["k8s", *pod]):
        assert launch([*verb, str(config), f"run_dir={place}"]) == 2
        printed = capsys.readouterr()
        assert f"run_dir is '{place}', but must be " in printed.err
        assert printed.out == ""
    findings = diagnose(config, [f"run_dir={place}"], device="cpu")
    failed = {found.check: found.text for found in findings if found.verdict == "FAIL"}
    assert set(failed) == {"config", "disk"}
    assert "run_dir: must be " in failed["config"]
    assert f"run_dir is '{place}', but must be " in failed["disk"]
    check_nothing_written(tmp_path)


@pytest.mark.parametrize(
    ("argv", "what"),
    [
        (["evaluate", URL], "RUN"),
        (["evaluate", "~/run"], "RUN"),
        (["evaluate", "a-file"], "RUN"),
        (["export-model", URL, "model"], "RUN"),
        (["export-model", "run", URL], "OUT"),
        (["export-model", "run", "$HOME/model"], "OUT"),
        (["import-model", "vae", URL], "OUT"),
        (["import-model", "vae", "~/model"], "OUT"),
        (["probe", URL], "EXPORT"),
        (["export", "plan", "tar", f"run={URL}", "out=latents"], "The run"),
        (
            ["export", "plan", "tar", "run=null", f"model={{kind: folder, path: '{URL}'}}"],
            "The model",
        ),
        (["slurm", "tar", "--export", f"run={URL}", "out=s3://bucket/latents"], "run"),
        (["slurm", "tar", "--export", "run=run", "out=~/latents"], "out"),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else value,
)
def test_verbs_refuse_it_by_the_argument_it_stands_for(
    config: Path,
    tmp_path: Path,
    argv: list[str],
    what: str,
    capsys: pytest.CaptureFixture[str],
):
    assert main(argv) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"error: {what} is '")
    assert printed.err.count("\n") == 1
    assert printed.out == ""
    check_nothing_written(tmp_path)


def test_python_is_told_the_same(config: Path, tmp_path: Path):
    for place in ("~/models/a", "file:///models/a"):
        with pytest.raises(UserError, match=r"must be written .*models/a"):
            lm.load(place)
    with pytest.raises(UserError, match="must be written out, as .*home/latents"):
        lm.LatentDataset("~/latents")
    with pytest.raises(UserError, match="init_from: must be a path of this machine"):
        lm.TrainConfig.load(config, f"init_from={URL}")


def test_a_folder_that_is_really_called_so_is_taken(config: Path, tmp_path: Path):
    (tmp_path / "~").mkdir()
    (tmp_path / "$HOME").mkdir()
    for place in ("~", "$HOME", "./~/a", "a b", "{x}"):
        assert lm.TrainConfig.load(config, f"run_dir={json.dumps(place)}").run_dir == place


@pytest.mark.parametrize("place", ["~/data", "$HOME/data"])
def test_data_is_named_as_written_too(
    config: Path, tmp_path: Path, place: str, capsys: pytest.CaptureFixture[str]
):
    told = f"The path '{place}' must be written out, as {tmp_path}/home/data: only a shell expands"
    assert train([str(config), f"data.path={place}", "--dry-run"]) == 2
    assert told in capsys.readouterr().err
    for argv in (["index", place], ["verify", place], ["pack", "sprites", place, "--count", "4"]):
        assert main(argv) == 2
        assert told in capsys.readouterr().err
    check_nothing_written(tmp_path)


def test_the_place_of_an_index_may_be_a_url(config: Path, tmp_path: Path, tiny_shards: Path):
    assert main(["index", str(tiny_shards), "--out", "memory://an/index", "--workers", "1"]) == 0
    assert Index.open("memory://an/index").dataset_id == Index.open(tiny_shards).dataset_id
    check_nothing_written(tmp_path)
