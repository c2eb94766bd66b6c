"""`latentmill evaluate`: other data sets, models from their folders, cards, mistakes."""

import json
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.__main__ import main
from pipeline.common import strict
from pipeline.config import TrainConfig
from pipeline.data.index import build_index
from pipeline.evaluation.card import Card, Identity
from pipeline.evaluation.trained import evaluate_run
from pipeline.export.model import export_model
from pipeline.models.interchange.importing import import_model
from pipeline.train import train
from pipeline.training.loading import load_config
from tests.config.runs import BASE, records
from tests.evaluation.test_sizes import small_batches, squared_error_at, squared_error_of
from tests.export.world import SHARD_ROWS, SPLIT, damage_sample, make_data, make_run, tree
from tests.shards import write_tiny_shards

pytestmark = pytest.mark.slow

GROUPS, WIDTH = 2, 4
RESNET = {
    "backbone": {"kind": "resnet", "widths": [WIDTH, 2 * WIDTH], "groups": GROUPS, "blocks": 1},
    "bottleneck": {"kind": "gaussian", "size": 2},
    "likelihood": {"kind": "squared_error"},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data") / "sprites", shards=2)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another data set, of one shard."""
    return make_data(tmp_path_factory.mktemp("other") / "sprites", shards=1)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    return small_batches(make_run(tmp_path_factory.mktemp("run"), data, RESNET))


@pytest.fixture(scope="module")
def exported(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("model") / "model"
    export_model(run_dir, out)
    return out


def evaluated(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    """The card that the command prints."""
    capsys.readouterr()
    assert main(["evaluate", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_run_is_evaluated_on_another_data_set(
    run_dir: Path, data: Path, other: Path, capsys: pytest.CaptureFixture[str]
):
    card = evaluated(capsys, run_dir, "--data", other, "--metrics", "squared_error")
    assert card["notes"] == ["the run was trained on another data set"]
    for prefix, weights in (("eval", "raw"), ("eval_ema", "ema")):
        by_hand = squared_error_at(run_dir, other, 32, weights)
        assert card[f"{prefix}/squared_error"] == pytest.approx(by_hand, rel=1e-4)
        assert card[f"{prefix}/samples"] == SHARD_ROWS
    part = evaluated(capsys, run_dir, "--data", other, "--split", "held_out")
    assert 0 < part["eval/samples"] < SHARD_ROWS
    # The data of the run itself by its path: the held-out split, as without it.
    own, same = evaluated(capsys, run_dir), evaluated(capsys, run_dir, "--data", data)
    assert own == same
    assert own["data"][0]["split"] == "held_out"


def test_bad_samples_of_another_data_set_are_printed_and_not_listed_as_the_runs(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Their numbers are those of samples of the run's own data."""
    broken = make_data(tmp_path / "broken", shards=1)
    damage_sample(broken, "shard-000000.tar", 3)
    assert main(["evaluate", str(run_dir), "--data", str(broken)]) == 0
    printed = capsys.readouterr()
    assert "eval/tombstones             1  " in printed.out
    assert "1 sample could not be used:\n" in printed.err
    assert not (run_dir / "quarantine.jsonl").exists()


def test_an_exported_model_has_the_figures_of_its_run(
    run_dir: Path, exported: Path, data: Path, capsys: pytest.CaptureFixture[str]
):
    kinds = ["squared_error", "log_likelihood", "psnr", "ssim", "active_units", "kl_per_dimension"]
    metrics = ["--metrics", *kinds]
    before = tree(exported)
    of_run = evaluated(capsys, run_dir, *metrics)
    card = evaluated(capsys, exported, "--data", data, "--split", "held_out", *metrics)
    assert card["evaluation_id"] == of_run["evaluation_id"]
    assert card["step"] == of_run["step"] == 2
    assert card["model"]["weights_sha256"]["eval"] == of_run["model"]["weights_sha256"]["eval_ema"]
    figures = {name: value for name, value in card.items() if name.startswith("eval/")}
    assert {"eval/psnr", "eval/ssim", "eval/kl", "eval/distortion"} <= figures.keys()
    wanted = {name: of_run[name.replace("eval/", "eval_ema/")] for name in figures}
    assert figures == pytest.approx(wanted, rel=1e-6)
    assert card["units"].keys() == figures.keys()
    assert "eval/loss" not in card
    assert card["notes"] == [
        "loss is left out: a model's folder does not say its training's objective"
    ]
    assert tree(exported) == before
    larger = evaluated(capsys, exported, "--data", data, "--split", "held_out", "--size", "48")
    assert larger["preprocessing"]["decode"]["size"] == 48
    assert larger["evaluation_id"] != card["evaluation_id"]


def test_a_folder_of_diffusers_is_evaluated_as_its_own_class_reconstructs(
    other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    torch.manual_seed(0)
    theirs = import_module("diffusers").AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[WIDTH, 2 * WIDTH],
        norm_num_groups=GROUPS,
        sample_size=32,
    )
    theirs.save_pretrained(tmp_path / "vae")
    import_model(tmp_path / "vae", tmp_path / "imported")

    def reconstruct(x: torch.Tensor) -> torch.Tensor:
        return (theirs.decode(theirs.encode(2 * x - 1).latent_dist.mean).sample + 1) / 2

    by_hand = squared_error_of(other, 32, reconstruct)
    cards = [
        evaluated(capsys, tmp_path / name, "--data", other, "--out", tmp_path / f"{name}-out")
        for name in ("vae", "imported")
    ]
    for card in cards:
        assert card["eval/squared_error"] == pytest.approx(by_hand, rel=1e-4)
        assert not {"step", "eval/loss", "eval/distortion", "eval/nats"} & card.keys()
        assert [note.partition(" is ")[0] for note in card["notes"]] == ["loss", "distortion"]
    models = [card.pop("model") for card in cards]
    assert models[0]["weights_sha256"] == models[1]["weights_sha256"]
    assert cards[0] == cards[1]
    assert sorted(path.name for path in (tmp_path / "vae-out").iterdir())[1] == "card.json"
    assert sorted(path.name for path in (tmp_path / "vae").iterdir()) == [
        "config.json", "diffusion_pytorch_model.safetensors",
    ]  # fmt: skip


def test_a_card_says_what_the_figures_depend_on_and_a_repetition_replaces_it(
    run_dir: Path, data: Path, capsys: pytest.CaptureFixture[str]
):
    card = evaluated(capsys, run_dir, "--step", "1", "--metrics", "psnr")
    folder = run_dir / "evaluations" / f"step-1-{card['evaluation_id']}"
    first = tree(folder)
    assert json.loads((folder / "card.json").read_text()) == card
    assert card["metrics"] == [{"kind": "psnr", "decodes": "mean"}]
    assert card["data"][0]["path"] == str(data)
    assert card["data"][0]["samples"] == card["eval/samples"]
    assert card["units"]["eval_ema/psnr"] == "dB: mean over images"
    assert card["versions"].keys() == {"latentmill", "torch"}
    config = load_config(run_dir)
    assert card["preprocessing"]["decode"] == config.data.decode.model_dump(mode="json")
    assert evaluated(capsys, run_dir, "--step", "1", "--metrics", "psnr") == card
    assert tree(folder) == first
    ids = {
        evaluated(capsys, run_dir, *words)["evaluation_id"]
        for words in (["--metrics", "psnr"], ["--split", "all"], ["--size", "48"], [])
    }
    assert len(ids) == 4
    assert card["evaluation_id"] in ids  # step 2, by the same metric


def test_names_places_and_the_order_of_lists_do_not_make_another_evaluation():
    network = {"kind": "frechet", "network": {"path": "/here/a.pt", "sha256": "ab"}}
    samples = {"dataset_id": "1", "split_id": "all", "samples": 4, "path": "/here"}
    first, psnr = Identity((samples,), {}, (network, {"kind": "psnr"})), {"kind": "psnr"}
    moved = {"kind": "frechet", "network": {"path": "/there/b.pt", "sha256": "ab"}}
    again = Identity((samples | {"path": "/there"},), {}, (psnr, moved))
    assert again.evaluation_id == first.evaluation_id
    other = {"kind": "frechet", "network": {"path": "/here/a.pt", "sha256": "cd"}}
    fewer = samples | {"samples": 3}
    others = (
        Identity((samples,), {}, (psnr, other)),
        Identity((fewer,), {}, (psnr, network)),
        Identity((samples,), {"size": 8}, (psnr, network)),
        Identity((samples, fewer), {}, (psnr, network)),
    )
    assert len({first.evaluation_id, *(one.evaluation_id for one in others)}) == 5


def test_a_training_says_what_its_own_evaluations_measure(tiny_shards: Path, tmp_path: Path):
    places = (f"data.path={tiny_shards}", f"run_dir={tmp_path / 'run'}")
    config = strict.load(TrainConfig, None, places, text=json.dumps(BASE))
    assert train(config) == 0
    path = tmp_path / "run/evaluations/training.json"
    identity = json.loads(path.read_text())
    card = evaluate_run(tmp_path / "run")
    assert identity["evaluation_id"] == card.identity.evaluation_id
    assert identity.items() <= card.content().items()
    assert train(config.model_copy(update={"num_steps": 5})) == 0
    assert json.loads(path.read_text()) == identity


def test_a_run_with_validation_data_of_its_own_is_evaluated_on_it(
    tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Also where the training's data is out of reach, or the other has moved."""
    train_data = Path(shutil.copytree(tiny_shards, tmp_path / "train"))
    write_tiny_shards(tmp_path / "val", counts=(9, 11))
    build_index(tmp_path / "val", split=SPLIT)
    data = f"{{path: {tmp_path}/val, split: train, shards: null}}"
    places = (f"data.path={train_data}", f"run_dir={tmp_path / 'run'}", f"evaluation.data={data}")
    config = strict.load(TrainConfig, None, places, text=json.dumps(BASE))
    assert train(config) == 0
    shutil.rmtree(train_data)
    run, moved = tmp_path / "run", tmp_path / "moved"
    card = evaluated(capsys, run)
    last = [record for record in records(run) if "eval/loss" in record][-1]
    assert {name: card[name] for name in last} == pytest.approx(last, rel=1e-6)
    assert card["data"][0]["split"] == "train"
    shutil.move(tmp_path / "val", moved)
    again = evaluated(capsys, run, "--data", moved)
    assert again.pop("data")[0]["path"] == str(moved)
    assert {name: again[name] for name in last} == pytest.approx(last, rel=1e-6)
    assert again["evaluation_id"] == card["evaluation_id"]
    few = evaluated(capsys, run, "--data", moved, "--max-samples", "3")
    assert (few["eval/samples"], few["max_samples"]) == (3, 3)
    assert main(["evaluate", str(run), "--data", str(moved), "--max-samples", "3"]) == 0
    of = card["data"][0]["split_samples"]
    assert f"split train of {moved}: 3 of {of} samples, each once\n" in capsys.readouterr().out


def test_where_nothing_can_be_written_one_line_says_so(
    run_dir: Path, small_disk: Any, capsys: pytest.CaptureFixture[str]
):
    disk = small_disk("4m")
    out = disk / "out"
    card = evaluated(capsys, run_dir, "--out", out)
    before = tree(out)
    # Full: the former card stays, and nothing half-written is left.
    free = shutil.disk_usage(disk).free
    (disk / "full").write_bytes(bytes(free))
    assert evaluated(capsys, run_dir, "--out", out, "--metrics", "psnr") != card
    assert tree(out) == before
    (disk / "full").unlink()
    small_disk("4m", "ro")
    assert main(["evaluate", str(run_dir), "--out", str(out), "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == card
    [line] = printed.err.splitlines()
    assert line.startswith(f"warning: {out} cannot be written to (Read-only file system)")


@pytest.mark.distributed
def test_of_two_processes_one_writes_and_prints(
    run_dir: Path, other: Path, tmp_path: Path, run_processes: Any
):
    words = ("evaluate", run_dir, "--data", other, "--out", tmp_path / "out", "--json")
    printed = run_processes("pipeline", 2, *words).output
    [line] = [line for line in printed.splitlines() if line.startswith("{")]
    card = json.loads(line)
    assert json.loads((tmp_path / "out/card.json").read_text()) == card
    alone = evaluate_run(run_dir, data=[str(other)], out=tmp_path / "alone")
    assert card["eval/samples"] == SHARD_ROWS
    assert {n: card[n] for n in alone.figures} == pytest.approx(alone.figures, rel=1e-5)


@pytest.mark.parametrize(
    "words, text",
    [
        ("MODEL", "name the data set to evaluate it on by --data PATH"),
        ("MODEL --data OTHER --step 2", "--step chooses a checkpoint, and MODEL is no run"),
        ("MODEL --data OTHER --data OTHER", "--data is given 2 times"),
        ("MODEL --data OTHER --split nope", "error: --split = 'nope': the index has the splits"),
        ("MODEL --data OTHER --size 31", "size is 31, but MODEL cannot take that"),
        ("RUN --split nope", "error: --split = 'nope': the index has the splits held_out,"),
        ("RUN --metrics psnrr", "unknown kind 'psnrr' (choices: squared_error, "),
        ("RUN --metrics {psnr", "--metrics '{psnr' is no metric: write its kind, as psnr"),
        ("RUN --metrics psnr psnr", "--metrics names a figure twice: psnr, psnr"),
        ("RUN --size 8 --metrics ssim", "but pictures have 8 x 8 (--size)"),
        ("POINT --metrics active_units", "metric active_units needs a density"),
        ("OTHER", "OTHER is neither a run directory, which has a config.yaml, nor the folder of"),
        ("RUN --data OTHER --shards OTHER --shards OTHER", "--shards is given 2 times"),
    ],
)
def test_mistakes(
    words: str,
    text: str,
    run_dir: Path,
    exported: Path,
    data: Path,
    other: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    places = {"MODEL": str(exported), "RUN": str(run_dir), "OTHER": str(other)}
    if "POINT" in words:
        point = {**RESNET, "bottleneck": {"kind": "deterministic", "size": 2}}
        places["POINT"] = str(make_run(tmp_path / "point", data, point))
    before = tree(run_dir)
    given = [places.get(word, word) for word in words.split()]
    assert main(["evaluate", *given]) == 2
    printed = capsys.readouterr()
    for name, place in places.items():
        text = text.replace(name, place)
    assert text in printed.err
    [_] = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert printed.out == ""
    assert tree(run_dir) == before


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "some"])
def test_a_number_of_samples_that_is_none(text: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", "runs/x", f"--max-samples={text}"])
    assert ended.value.code == 2
    assert "is no number: write 1 or more, or all" in capsys.readouterr().err


def test_the_number_of_samples_stands_beside_what_depends_on_it():
    kid = {"kind": "kid", "images": 50}
    figures = {"eval/samples": 1000, "eval/val/samples": 40, "eval/fd_lite_01234567": 1.0}
    figures |= {"eval/kid_lite_01234567": 0.1, "eval/val/kid_lite_01234567": 0.1, "eval/psnr": 30}
    identity = Identity((), {}, (kid, {"kind": "frechet"}))
    card = Card(identity, {}, 1, figures, precision="fp32", seed=0, in_nats=False)
    assert card.unit("eval/fd_lite_01234567") == "squared distance: 0 = equal; N = 1,000"
    assert card.unit("eval/kid_lite_01234567").endswith("; N = 50")
    assert card.unit("eval/val/kid_lite_01234567").endswith("; N = 40")
    assert card.unit("eval/psnr") == "dB: mean over images"
