"""Pictures under other suffixes than the model was trained on; checked before planning."""

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.__main__ import main
from pipeline.common import strict
from pipeline.common.errors import DONE, UserError
from pipeline.data.decode import ArrayDecode, Decode
from pipeline.export.command import make_plan
from pipeline.export.model import export_model
from pipeline.export.verify.levels import verify_export
from pipeline.export.verify.reencode import verify_with_run
from pipeline.latents import LatentDataset
from pipeline.training.loading import load_config
from tests.export.foreign import picture, write_shards
from tests.export.world import make_config, run_export

ROWS = 5


def data_of(folder: Path, suffix: str) -> Path:
    """Two shards of pictures under a suffix, each beside a small one under another."""
    return write_shards(
        folder,
        {
            f"{shard}.tar": {
                name: content
                for i in range(ROWS)
                for name, content in (
                    (f"{shard}{i}.{suffix}", picture(50 * shard + i)),
                    (f"{shard}{i}.thumb.png", picture(0)),
                )
            }
            for shard in range(2)
        },
    )


@pytest.fixture
def trained_on(run_dir: Path, tmp_path: Path) -> Callable[..., Path]:
    """A run that is said to have been trained on other members."""

    def make(decode: Decode | None = None, **changes: Any) -> Path:
        run = Path(shutil.copytree(run_dir, tmp_path / "run"))
        config = load_config(run)
        decode = decode or config.data.decode.model_copy(update=changes)
        data = config.data.model_copy(update={"decode": decode})
        text = strict.dump(config.model_copy(update={"data": data}))
        (run / "config.yaml").write_text(text)
        return run

    return make


def test_a_model_trained_on_input_jpg_is_exported_on_jpg(
    trained_on: Callable[..., Path], run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    run, out, data = trained_on(suffixes=("input.jpg",)), tmp_path / "out", tmp_path / "data"
    source = {"path": str(data_of(data, "jpg"))}
    with pytest.raises(UserError, match=r"input\.jpg .*jpg \(10\)"):
        run_export(make_config(run, out, data=source))
    assert not out.exists()
    assert run_export(make_config(run, out, data=source | {"suffixes": ["png", "jpg"]})) == DONE
    assert run_export(make_config(run_dir, tmp_path / "same", data=source)) == DONE
    found, expected = (LatentDataset(path)[:] for path in (out, tmp_path / "same"))
    assert found.valid.all()
    np.testing.assert_array_equal(found.mu, expected.mu)
    # By the manifest, without a word about suffixes.
    report = verify_with_run(str(out), str(run), source=str(data), shards=None, num_tasks=2)
    assert report.problems == []
    assert report.notes == ["10 rows encoded anew, 10 of them bit for bit"]
    assert main(["probe", str(out), "--source", str(data)]) != DONE  # no target, but no KeyError
    assert "no target at all" in capsys.readouterr().err


def test_an_exported_model_takes_them_alike(trained_on: Callable[..., Path], tmp_path: Path):
    run, data = trained_on(suffixes=("input.jpg",)), data_of(tmp_path / "data", "target.webp")
    export_model(run, tmp_path / "model")
    settings = {
        "run": None,
        "model": {"kind": "folder", "path": str(tmp_path / "model")},
        "data": {"path": str(data), "suffixes": ["target.webp"]},
    }
    out = tmp_path / "out"
    assert run_export(make_config(run, out, **settings)) == DONE
    assert LatentDataset(out).column("valid").all()
    assert verify_export(out, source=data).problems == []


def test_other_suffixes_are_another_export(run_dir: Path, tmp_path: Path):
    source = {"path": str(data_of(tmp_path / "data", "jpg"))}
    assert run_export(make_config(run_dir, tmp_path / "out", data=source)) == DONE
    other = make_config(run_dir, tmp_path / "out", data=source | {"suffixes": ["thumb.png"]})
    with pytest.raises(UserError, match=r"suffixes\.0: there 'jpg', now 'thumb\.png'"):
        run_export(other)


@pytest.mark.parametrize(("bound", "is_planned"), [(0.1, False), (0.74, False), (0.76, True)])
def test_mostly_unwanted_pictures_are_told_before_planning(
    run_dir: Path, tmp_path: Path, bound: float, is_planned: bool
):
    """Three of four are `.jfif`; and what is no sample at all is said by the plan."""
    members = {f"{i}.jpg" if i % 4 == 0 else f"{i}.jfif": picture(i) for i in range(20)}
    members |= {"._0.jpg": b"a resource fork", "README": b"no suffix"}
    data = {"path": str(write_shards(tmp_path / "data", {"0.tar": members}))}
    config = make_config(run_dir, tmp_path / "out", data=data, max_bad_fraction=bound)
    if is_planned:
        report = make_plan(config)
        assert (report.rows, len(report.left_out)) == (20, 2)
        text = "\n".join(report.lines())
        for line in report.left_out:
            assert line in text
        assert "README" in text
        assert "._0.jpg" in text
    else:
        with pytest.raises(UserError, match=r"15 of the 20 samples \(75 %\).*data\.suffixes"):
            make_plan(config)
        assert not (tmp_path / "out").exists()


def test_arrays_have_one_suffix(trained_on: Callable[..., Path], tmp_path: Path):
    run = trained_on(ArrayDecode(shape=(1, 32, 32), range=(0.0, 1.0)))
    file = io.BytesIO()
    np.save(file, np.full((1, 32, 32), 0.5, np.float32))
    data = {"path": str(write_shards(tmp_path / "data", {"0.tar": {"a.x.npy": file.getvalue()}}))}
    with pytest.raises(UserError, match=r"with a suffix of npy .*x\.npy \(1\)"):
        run_export(make_config(run, tmp_path / "out", data=data))
    with pytest.raises(UserError, match=r"data\.suffixes is \[npy, x\.npy\], but arrays .* one"):
        run_export(make_config(run, tmp_path / "out", data=data | {"suffixes": ["npy", "x.npy"]}))
    assert run_export(make_config(run, tmp_path / "out", data=data | {"suffixes": ["x.npy"]})) == 0
    assert LatentDataset(tmp_path / "out").column("valid").all()
    report = verify_with_run(
        str(tmp_path / "out"), str(run), source=data["path"], shards=None, num_tasks=1
    )
    assert report.problems == []
