"""Which images an evaluation shows: the same at every batch size, and the best and the worst."""

import json
import shutil
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from pipeline.common import rng
from pipeline.common.errors import WRONG_USE, UserError
from pipeline.corruptions import corrupt
from pipeline.data.decode import ImageDecode
from pipeline.data.index import Index, build_index
from pipeline.data.index.splits import SplitSpec
from pipeline.distributed.runtime import Runtime
from pipeline.evaluation.gallery import Candidate, Selection
from pipeline.evaluation.held_out import HeldOut
from pipeline.evaluation.pictures import picture_rows
from pipeline.evaluation.splits import held_out_splits
from pipeline.evaluation.trained import evaluate_run
from pipeline.models.autoencoder import ModelOutput
from pipeline.models.bottlenecks import Code, Posterior
from pipeline.monitoring.bad_samples import Quarantine
from pipeline.monitoring.monitor import Monitor
from pipeline.monitoring.sheets import write_sheet
from pipeline.train import main
from pipeline.training.build import check_data, make_forward
from tests.evaluation.test_reconstruction import config_of, model_of
from tests.shards import TINY_COUNTS, tiny_image, write_tiny_shards

SIZE, COUNT = 32, 400
RATE = "optimizer.learning_rate.warmup_samples=0"


@pytest.fixture(scope="module")
def runtime():
    return Runtime.start(accumulation=1)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """400 pictures in five shards."""
    folder = tmp_path_factory.mktemp("pictures")
    write_tiny_shards(folder, (100, 50, 150, 1, 99))
    build_index(folder)
    return folder


def shown(shards, out, runtime, model=None, log_to=None, step=0, **settings):
    """Evaluate all samples, write what is shown to `out`; the content of the JSON file."""
    settings["evaluation"] = {"split": "all", **settings.get("evaluation", {})}
    config = config_of(shards, **({"batch_size": 64} | settings))
    indexes = [Index.open(s.path, number) for number, s in enumerate(config.data.sources)]
    held_out = HeldOut(
        config,
        held_out_splits(config, indexes, check_data(config, indexes)),
        make_forward(config, torch.device("cpu")),
        runtime,
        Quarantine(out, config.data, runtime),
    )
    views = {"eval": lambda: nullcontext(model or model_of(config))}
    held_out.evaluate(views, step, monitor=log_to, show=lambda *what: write_sheet(out, *what))
    return json.loads((out / f"eval-{step:08d}.json").read_text())


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


def keys(entries):
    return [entry["key"] for entry in entries]


def draw_of(index: Index, number: int) -> int:
    """The hash of a sample by the data set's id and its position, by hand."""
    at = torch.tensor([number])
    name = f"evaluation/shown/{index.dataset_id}"
    return int(rng.sample_keys(0, name, epoch=torch.zeros(1).long(), uid=at))


def test_the_same_pictures_at_every_batch_size_and_seed(shards, runtime, tmp_path):
    index = Index.open(shards)
    expected = sorted(range(COUNT), key=lambda number: draw_of(index, number))[:8]
    model = model_of(config_of(shards))
    sheets, files = {}, {}
    for size in (128, 64, 5):
        out = tmp_path / f"{size}"
        sheets[size] = shown(shards, out, runtime, model, batch_size=size)
        files[size] = {path.name: path.read_bytes() for path in sorted(out.iterdir())}
        assert list(files[size]) == [
            *("best_worst-eval-00000000.png", "eval-00000000.json", "eval-00000000.png")
        ]
    assert files[64] == files[128]
    assert files[5].keys() == files[64].keys()
    for kind in ("pictured", "best", "worst"):
        assert keys(sheets[5][kind]) == keys(sheets[64][kind])
    assert keys(sheets[64]["pictured"]) == [f"{number:06d}" for number in expected]
    # Another run: other weights and another seed.
    other = shown(shards, tmp_path / "other", runtime, model_of(config_of(shards), 1), seed=5)
    assert keys(other["pictured"]) == keys(sheets[64]["pictured"])
    # A copy of the data set, elsewhere and with other splits: still the same data.
    copy = shutil.copytree(shards, tmp_path / "copy")
    build_index(copy, split=SplitSpec(fractions={"train": 0.5, "other": 0.5}))
    assert Index.open(copy).dataset_id == index.dataset_id
    assert keys(shown(copy, tmp_path / "moved", runtime)["pictured"]) == keys(other["pictured"])


def test_the_place_of_a_data_set_in_a_mixture_does_not_matter(
    shards, tiny_shards, runtime, tmp_path
):
    found = {}
    for name, parts in (("one", (shards, tiny_shards)), ("two", (tiny_shards, shards))):
        data = {
            "mixture": [{"path": str(part)} for part in parts],
            "decode": {"kind": "image", "size": SIZE, "channels": 3},
        }
        found[name] = shown(shards, tmp_path / name, runtime, data=data)["pictured"]
    assert [(e["key"], e["shard"]) for e in found["one"]] == [
        (e["key"], e["shard"]) for e in found["two"]
    ]


def test_pictures_are_clean_corrupted_reconstruction_error(shards, runtime, tmp_path):
    settings = {"likelihood": "squared_error", "bottleneck": "deterministic"}
    config = config_of(shards, **settings)
    model, count = model_of(config), 3
    sheet = shown(shards, tmp_path, runtime, model, **settings, **images(count))
    grid = pixels(tmp_path / "eval-00000000.png")
    assert grid.shape == (count * SIZE, 4 * SIZE, 3)
    cells = grid.reshape(count, SIZE, 4, SIZE, 3).transpose(2, 0, 1, 3, 4).astype(int)
    for row, entry in enumerate(sheet["pictured"]):
        number = int(entry["key"])
        x = torch.from_numpy(tiny_image(number)).permute(2, 0, 1)[None] / 255
        seen, mean = seen_and_mean(config, model, x, number)
        for column, image in enumerate((x, seen, mean, (x - mean).abs())):
            expected = (image[0].clamp(0, 1) * 255).round().permute(1, 2, 0).numpy()
            assert np.abs(cells[column, row] - expected).max() <= 1
        assert np.array_equal(cells[0, row], tiny_image(number))
        error = float((x - mean).square().sum())
        assert entry["squared_error"] == pytest.approx(error, rel=1e-5)


def images(count):
    return {"monitor": {"num_images": count}}


@torch.no_grad()
def seen_and_mean(config, model, x, uid):
    """What the encoder sees of one image, and its reconstruction."""
    epoch, one = torch.zeros(1).long(), torch.tensor([uid])
    keys = rng.sample_keys(config.seed, "evaluation/corruption", epoch=epoch, uid=one)
    seen = corrupt(x, config.corruptions, keys).x
    mu = model(seen, mode="encode").posterior.mu
    return seen, config.model.likelihood.mean(model(mu, mode="decode").decoded)


def test_best_and_worst_are_those_of_a_sort_over_all_images(shards, runtime, tmp_path):
    config = config_of(shards)
    model = model_of(config)
    errors, decibels = {}, {}
    for number in range(COUNT):
        x = torch.from_numpy(tiny_image(number)).permute(2, 0, 1)[None] / 255
        _, mean = seen_and_mean(config, model, x, number)
        errors[f"{number:06d}"] = float((x - mean).square().sum())
        saved = np.round(np.clip(mean.double().numpy(), 0, 1) * 255) / 255
        decibels[f"{number:06d}"] = -10 * np.log10(((x.numpy() - saved) ** 2).mean())
    order = sorted(errors, key=errors.__getitem__)
    metrics = [{"kind": "squared_error"}, {"kind": "psnr"}]
    settings = {"evaluation": {"metrics": metrics}}
    sheet = shown(shards, tmp_path / "error", runtime, model, **settings)
    assert sheet["rows_by"] == "squared_error"
    assert keys(sheet["best"]) == order[:10]
    assert keys(sheet["worst"]) == order[:-11:-1]
    for entry in [*sheet["best"], *sheet["worst"]]:
        assert entry["squared_error"] == pytest.approx(errors[entry["key"]], rel=1e-5)
        assert set(entry) == {"key", "shard", "squared_error", "psnr"}
    grid = pixels(tmp_path / "error" / "best_worst-eval-00000000.png")
    cells = grid.reshape(20, SIZE, 4, SIZE, 3)
    for row, entry in enumerate([*sheet["best"], *sheet["worst"]]):
        assert np.array_equal(cells[row, :, 0], tiny_image(int(entry["key"])))
    # Larger is better.
    settings["monitor"] = {"rows_by": "psnr"}
    by_psnr = shown(shards, tmp_path / "psnr", runtime, model, **settings)
    order = sorted(decibels, key=decibels.__getitem__)
    assert keys(by_psnr["worst"]) == order[:10]
    assert keys(by_psnr["best"]) == order[:-11:-1]


class Perfect(nn.Module):
    """Reconstructs every image as it is."""

    def forward(self, x, *, keys=None, mode="autoencode"):
        del keys, mode
        return ModelOutput(Code(x, Posterior(x, None)), torch.logit(x), {})


def test_equal_values_are_put_in_order_by_the_hash(shards, runtime, tmp_path):
    settings = {
        "likelihood": "squared_error",
        "bottleneck": "deterministic",
        "corruptions": (),
        "evaluation": {"metrics": [{"kind": "psnr"}]},
    }
    index = Index.open(shards)
    expected = sorted(range(COUNT), key=lambda number: draw_of(index, number))
    for size in (7, 64):
        out = tmp_path / f"{size}"
        sheet = shown(shards, out, runtime, Perfect(), batch_size=size, **settings)
        for kind, count in (("pictured", 8), ("best", 10), ("worst", 10)):
            assert keys(sheet[kind]) == [f"{number:06d}" for number in expected[:count]]
            assert {entry["psnr"] for entry in sheet[kind]} == {100.0}


def test_named_images_are_pictured_in_that_order(shards, runtime, tmp_path):
    wanted = ["000399", "000007", "000101"]
    settings = {"monitor": {"pictured": wanted, "num_images": 1}}
    for size in (3, 64):
        out = tmp_path / f"{size}"
        sheet = shown(shards, out, runtime, batch_size=size, **settings)
        assert keys(sheet["pictured"]) == wanted
        grid = pixels(out / "eval-00000000.png").reshape(3, SIZE, 4, SIZE, 3)
        for row, key in enumerate(wanted):
            assert np.array_equal(grid[row, :, 0], tiny_image(int(key)))


def test_a_key_that_is_not_evaluated_is_named(shards, runtime, tmp_path, capsys):
    settings = {"monitor": {"pictured": ["000001", "nobody"], "wandb": {"mode": "disabled"}}}
    with pytest.raises(UserError, match=r"monitor.pictured names 'nobody': no evaluated sample"):
        shown(shards, tmp_path, runtime, **settings)
    assert list(tmp_path.iterdir()) == []
    # A training that is under way is not stopped by it.
    config = config_of(shards, **settings)
    tmp_path.joinpath("run").mkdir()
    with Monitor(
        tmp_path / "run", config.monitor, resolved={}, step=9, num_steps=99, is_main=True
    ) as monitor:
        sheet = shown(shards, tmp_path, runtime, step=9, log_to=monitor, **settings)
    assert keys(sheet["pictured"]) == ["000001"]
    assert "names 'nobody'" in capsys.readouterr().err


def test_few_images_and_none(tiny_shards, runtime, tmp_path):
    split = {"evaluation": {"split": "held_out"}}
    few = sum(Index.open(tiny_shards).counts("held_out"))
    assert 10 < few < 20 < sum(TINY_COUNTS)
    sheet = shown(tiny_shards, tmp_path, runtime, **images(1000), **split)
    assert [len(sheet[name]) for name in ("pictured", "best", "worst")] == [few, 10, 10]
    out = tmp_path / "none"
    out.mkdir()
    with pytest.raises(FileNotFoundError):
        shown(tiny_shards, out, runtime, **images(0), **split)
    assert list(out.iterdir()) == []


def test_a_diverged_model_is_shown_and_its_images_are_the_worst():
    scores = np.array([2.0, np.inf, 1.0, np.inf])  # as `Gallery` has NaN
    selection = Selection(3)
    for first in (0, 2):
        part = slice(first, first + 2)
        draws, uids = np.array([7, 5, 3, 1])[part], np.arange(4)[part]
        entering = selection.entering(scores[part], draws, uids)
        selection.add([Candidate(scores[part][i], draws[i], uids[i], {}, None) for i in entering])
    chosen, _ = selection.gather(Runtime.start(accumulation=1), None)
    assert [candidate.uid for candidate in chosen] == [2, 0, 3]


def test_of_images_with_one_key_one_is_pictured():
    """Data may have equal keys: those of the second key are not crowded out."""
    selection = Selection(2, one_per_score=True)
    for draws in ([5, 4, 3, 9], [1, 8, 7, 2]):
        scores, draws = np.array([0.0, 0.0, 0.0, 1.0]), np.array(draws)
        entering = selection.entering(scores, draws, draws)
        selection.add([Candidate(scores[i], draws[i], draws[i], {}, None) for i in entering])
    chosen, _ = selection.gather(Runtime.start(accumulation=1), None)
    assert [candidate.uid for candidate in chosen] == [1, 2]


def test_a_training_with_an_unknown_key_ends_before_its_first_step(shards, tmp_path, capsys):
    def train(key):
        settings = ("num_steps=1", "batch_size=8", "data.decode.size=32", "ema_decay=null")
        also = (f"run_dir={tmp_path}/run", "monitor.wandb.mode=disabled", RATE)
        return main(["vae", f"data.path={shards}", *settings, *also, f"monitor.pictured=['{key}']"])

    assert train("nobody") == WRONG_USE
    assert "monitor.pictured names 'nobody'" in capsys.readouterr().err
    assert list((tmp_path / "run" / "images").iterdir()) == []
    evaluated = Index.open(shards)
    table = evaluated.table(2)
    key = table.keys(table.rows_of(evaluated.split_number("held_out")))[0]
    assert train(key) == 0
    sheet = json.loads((tmp_path / "run/images/eval-00000001.json").read_bytes())
    assert keys(sheet["pictured"]) == [key]
    # `evaluate` shows what the training showed.
    evaluate_run(tmp_path / "run")
    for name in ("eval-00000001.json", "eval-00000001.png", "best_worst-eval-00000001.png"):
        [again] = (tmp_path / "run" / "evaluations").rglob(name)
        assert again.read_bytes() == (tmp_path / "run" / "images" / name).read_bytes()


def test_pictures_show_alpha_as_the_background_and_its_error():
    clean, mean = torch.zeros(2, 1, 4, 5, 7)
    clean[0, :3], clean[0, 3, :, :4] = 0.4, 1.0  # the right part is clear
    mean[0, :3], mean[0, 3, 1:] = 0.3, 0.5
    decode = ImageDecode(size=[5, 7], channels=4, background=51)
    rows = picture_rows(clean, clean, mean, decode)
    assert rows is not None
    assert rows.shape == (1, 5, 4 * 7, 3)
    shown, _, found, error = np.split(rows[0], 4, axis=1)
    assert (shown[:, :4] == 102).all()
    assert (shown[:, 4:] == 51).all()
    assert (found[0] == 51).all()
    assert (abs(found[1:].astype(int) - 255 * 0.25) <= 1).all()  # 0.5 * 0.3 + 0.5 * 0.2
    assert (error[0, :4] == 255).all()  # of alpha
    assert (error[1:, :4] == 128).all()
    assert (abs(error[0, 4:].astype(int) - 255 * 0.1) <= 1).all()  # of the colours alone
