"""Members that are thrown away again: each is one file and one name, and each really runs.

They are added to a copy of the tree, and trained from there. `pytest -s` prints which files each of
them touched, and how far the strategies are apart.
"""

import json
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.checkpoints.folder import read_tensors
from pipeline.common.errors import WRONG_USE
from tests.distributed.test_equivalence import config, difference, logged
from tests.house import House, copy_house
from tests.processes import Result
from tests.seams.house import DOORS, enter
from tests.seams.worker import JOBS, PLAIN

__all__ = ["config"]  # a fixture

pytestmark = [pytest.mark.deepspeed, pytest.mark.timeout(300)]
WORKER, REFERENCE = "tests.seams.worker", "tests.seams.reference"
TRAINED = ("edges", "duel", "codebook", "mirror")  # also under ZeRO
ZERO = (pytest.param("zero1", marks=pytest.mark.soak), "zero2", "zero3")


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> House:
    """The tree with all members."""
    house = copy_house(tmp_path_factory.mktemp("seams") / "house")
    for door in DOORS:
        new, changed = enter(house, door)
        assert new == [f"{door.folder}/{door.member}.py"]
        assert changed == [f"{door.folder}/__init__.py"]
    return house


Work = Callable[..., dict[str, Any]]


@pytest.fixture
def work(run_processes: Callable[..., Result], house: House, config: Path, tmp_path: Path) -> Work:
    """Do jobs in one start of so many processes; what each found."""

    def run(world: int | None, *words: str, strategy: str = "ddp") -> dict[str, Any]:
        out = tmp_path / f"{strategy}-{world}"
        out.mkdir()
        argv = (WORKER, world, out, config, *words)
        result = run_processes(*argv, strategy=strategy, cwd=house.root)
        assert result.code == 0, result.output
        found: dict[str, Any] = {}
        for path in out.glob("*.json"):
            found[path.stem] = json.loads(path.read_text())
        for path in out.glob("*.npz"):
            with np.load(path) as arrays:
                found[path.stem] = dict(arrays)
        return found

    return run


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """One process's results, made once for each precision."""
    kept: dict[tuple[str, ...], dict[str, Any]] = {}

    def run(work: Work, *words: str) -> dict[str, Any]:
        if words not in kept:
            kept[words] = work(None, *words)
        return kept[words]

    return run


def test_every_member_is_one_file_and_one_name_and_learns(alone, work: Work):
    found = alone(work, "--", *JOBS)
    for name in (*TRAINED, "spread"):
        losses = found[name]["losses"]
        assert np.isfinite(losses).all()
    first = {name: found[name]["gradients"][0] for name in ("edges", "no_edges")}
    assert first["edges"].shape == first["no_edges"].shape  # the frozen network is no parameter
    # One rests: decay would shrink its weights at a loss of zero. The other trains.
    for name, moved in found["rest"].items():
        assert moved == (not name.startswith("discriminator.")), name
    # Both or neither, alike in all micro-batches of a step; some steps are, and some are not.
    assert {tuple(sides) for sides in found["mirrored"]["sides"]} == {(True,) * 4, (False,) * 4}
    changed = np.linalg.norm(first["edges"] - first["no_edges"])
    assert changed > 0.1 * np.linalg.norm(first["no_edges"])


@pytest.mark.parametrize("world", [2, 4])
def test_ddp_equals_one_process_in_float64(alone, work: Work, world: int):
    """A term that is not linear in the batch: 1 x 64 = 2 x 32 = 4 x 16, with broken samples."""
    jobs = (*TRAINED, "spread") if world == 2 else ("spread",)
    settings = ("precision=fp64", "batch_size=64", "--")
    expected = alone(work, *settings, *TRAINED, "spread")
    found = work(world, *settings, *jobs)
    for name in jobs:
        apart = difference(found[name], expected[name])
        print(f"float64, {world} processes, {name}: {apart}")
        assert max(apart) < 1e-9
    assert (expected["spread"]["weights"] < 64).any()  # slots without a sample were left out


@pytest.mark.parametrize("strategy", ZERO)
def test_zero_takes_the_steps_of_one_process(alone, work: Work, strategy: str):
    expected = alone(work, "--", *JOBS)
    found = work(2, "--", *TRAINED, "evaluation", "rest", strategy=strategy)
    assert found["rest"] == expected["rest"]
    for name in TRAINED:
        apart = difference(found[name], expected[name])
        print(f"{strategy}, 2 processes, {name}: {apart}")
        assert apart.losses < 1e-4
        assert apart.gradients < 5e-4
    check_evaluation(found["evaluation"], micro_batch=4)
    check_same_figures(found["evaluation"], expected["evaluation"], rel=1e-5)


def check_evaluation(found: dict[str, Any], micro_batch: int) -> None:
    """However the stored batches are cut, and in two passes: the same bits."""
    assert found["whole"] == found["several"] == found["single"] == found["two_passes"]
    assert found["sizes"] == [micro_batch]
    assert found["weights_stay"]
    whole = found["whole"]
    assert whole["eval/loss"] != pytest.approx(whole["eval_ema/loss"], rel=1e-3)


def check_same_figures(found: dict[str, Any], expected: dict[str, Any], rel: float) -> None:
    """Metrics of sums and of rows do not depend on the processes."""
    names = {"covariance_trace", "covariance_max", "median", "median_images", "nats"}
    names |= {"psnr", "psnr_pooled", "ssim", "ssim_sample", "active_units"}
    names |= {f"kl_per_dimension_{name}" for name in ("max", "median", "min")}
    assert {f"eval/{name}" for name in names} <= found["whole"].keys()
    assert found["whole"] == pytest.approx(expected["whole"], rel=rel)


def check_same_rows(found: dict[str, Any], expected: dict[str, Any], rel: float) -> None:
    """What is shown is the same, whichever processes had the images."""
    assert found.keys() == expected.keys() == {"eval", "eval_ema"}
    for name, sheet in expected.items():
        assert found[name].keys() == sheet.keys()
        assert found[name]["pictures"] == sheet["pictures"]
        vectors = found[name]["vectors"]["kl_per_dimension"]
        assert vectors == pytest.approx(sheet["vectors"]["kl_per_dimension"], rel=rel)
        for kind, count in (("pictured", 5), ("best", 10), ("worst", 10)):
            assert len(sheet[kind]) == count
            for entry, wanted in zip(found[name][kind], sheet[kind], strict=True):
                assert entry["key"] == wanted["key"]
                for figure in ("squared_error", "psnr", "ssim", "ssim_sample"):
                    assert entry[figure] == pytest.approx(wanted[figure], rel=rel)
    pictured = [[entry["key"] for entry in sheet["pictured"]] for sheet in expected.values()]
    assert pictured[0] == pictured[1]


def test_an_evaluation_is_the_same_in_chunks_and_on_any_number_of_processes(alone, work: Work):
    settings = ("precision=fp64", "batch_size=12", "--", "evaluation", "reduction")
    one = alone(work, *settings)
    expected = one["evaluation"]
    check_evaluation(expected, micro_batch=12)
    assert expected["whole"]["eval/median_images"] == one["reduction"]["median_images"] == 10
    for world, accumulation in ((2, 1), (3, 2)):
        words = (f"accumulation={accumulation}", *settings)
        several = work(world, *words)
        check_evaluation(several["evaluation"], micro_batch=12 // world // accumulation)
        check_same_figures(several["evaluation"], expected, rel=1e-10)
        check_same_rows(several["evaluation"]["shown"], expected["shown"], rel=1e-10)
        # Fed with recorded values.
        assert several["reduction"] == pytest.approx(one["reduction"], rel=1e-12)


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
def test_the_game_is_the_update_of_both_players_in_turn(
    run_processes: Callable[..., Result], house: House, config: Path, precision: str
):
    settings = (*PLAIN, *JOBS["duel"], f"precision={precision}", "num_steps=20")
    result = run_processes(REFERENCE, None, config, *settings, cwd=house.root)
    assert result.code == 0, result.output
    found = json.loads(result.output.splitlines()[-1])
    print(f"{precision}: {found}")
    assert found["gradients"] < 1e-6
    assert found["norms"] < 1e-5
    assert found["share"] >= 0.3
    if precision == "fp64":
        assert found["weights"] < 1e-6
        assert found["moved"] > 1e-3


def test_what_depends_on_the_cut_of_a_batch_is_refused_where_the_cut_changes(
    run_processes: Callable[..., Result], house: House, config: Path, tmp_path: Path
):
    def train(world: int | None, over: str, *settings: str) -> Result:
        term = f"objective.regularisers=[{{kind: kl}}, {{kind: spread, over: {over}}}]"
        argv = ("pipeline.train", world, config, *PLAIN, term, f"run_dir={tmp_path / over}")
        return run_processes(*argv, *settings, cwd=house.root)

    refused = train(None, "global_batch", "num_steps=2", "accumulation=2")
    assert refused.code == WRONG_USE
    assert "spread depends on the whole global batch, but accumulation 2" in refused.output
    trained = train(None, "micro_batch", "num_steps=2", "accumulation=2")
    assert trained.code == 0, trained.output
    for world, accumulation, said in ((None, 1, "accumulation: there 2, now 1"), (2, 2, "1 proc")):
        refused = train(world, "micro_batch", "num_steps=4", f"accumulation={accumulation}")
        assert refused.code != 0
        assert said in refused.output, refused.output
    trained = train(None, "micro_batch", "num_steps=4", "accumulation=2")
    assert trained.code == 0, trained.output


def test_codes_without_a_posterior_are_trained_and_not_exported(
    run_processes: Callable[..., Result], house: House, config: Path, tmp_path: Path
):
    run = tmp_path / "run"
    settings = (*PLAIN, *JOBS["codebook"], "num_steps=2", f"run_dir={run}")
    trained = run_processes("pipeline.train", None, config, *settings, cwd=house.root)
    assert trained.code == 0, trained.output
    (tmp_path / "export.yaml").write_text(json.dumps({"run": str(run), "out": f"{run}-latents"}))
    argv = ("pipeline.export", None, tmp_path / "export.yaml")
    refused = run_processes(*argv, cwd=house.root)
    assert refused.code == WRONG_USE
    assert "bottleneck gives codes without a posterior" in refused.output
    assert not Path(f"{run}-latents").exists()


GAME_RUN = (
    *PLAIN,
    *JOBS["duel"],
    "num_steps=60",
    "checkpoint.every_steps=10",
    "checkpoint.keep.latest=99",
    "freeze=[encoder.0.*, discriminator.0.*]",
)
FROZEN = {
    f"{layer}.0.{kind}" for layer in ("encoder", "discriminator") for kind in ("weight", "bias")
}
FILES = ("model.safetensors", "ema.safetensors", "optimizer.safetensors")


@pytest.mark.parametrize(("strategy", "other"), [("ddp", "zero2"), ("zero2", "ddp")])
def test_the_game_goes_on_after_a_kill_and_under_another_strategy(
    start_processes, house: House, config: Path, tmp_path: Path, strategy: str, other: str
):
    def start(run: Path, strategy: str):
        # Evaluations leave no trace, either: one of the runs has more of them.
        every_steps = 12 if run == killed else 30
        settings = (f"run_dir={run}", f"evaluation.every_steps={every_steps}", *GAME_RUN)
        argv = ("pipeline.train", 2, config, *settings)
        return start_processes(*argv, strategy=strategy, cwd=house.root)

    def finish(run: Path, strategy: str) -> None:
        ended = start(run, strategy).wait()
        assert ended.code == 0, ended.output

    whole, killed, changed = (tmp_path / name for name in ("whole", "killed", "changed"))
    finish(whole, strategy)
    process = start(killed, strategy)
    step, limit = random.choice((10, 20, 30)), time.monotonic() + 90
    while not (killed / "checkpoints" / f"step-{step}").exists():
        assert process.running, process.output
        assert time.monotonic() < limit, process.output
        time.sleep(0.002)
    process.kill()
    assert not (killed / "checkpoints" / "step-60").exists()
    print(f"{strategy}: killed at step {step}")
    finish(killed, strategy)
    for name in FILES:
        ends = [run / "checkpoints" / "step-60" / name for run in (whole, killed)]
        assert ends[0].read_bytes() == ends[1].read_bytes(), name

    shutil.copytree(whole, changed)
    for later in (40, 50, 60):
        shutil.rmtree(changed / "checkpoints" / f"step-{later}")
    finish(changed, other)
    found, expected = (logged(run, "train/loss")[-1] for run in (changed, whole))
    assert found == pytest.approx(expected, rel=1e-3)
    tensors = read_tensors(changed / "checkpoints" / "step-60")
    assert {name for name in tensors.model if name.startswith("discriminator.")}
    assert not {name for name in tensors.ema or {} if name.startswith("discriminator.")}
    first = read_tensors(whole / "checkpoints" / "step-10").model
    assert all(torch.equal(tensors.model[name], first[name]) for name in FROZEN)
    # Hinge losses cancel in the last bias of a discriminator, which may stay.
    moved = {name for name, v in tensors.model.items() if not torch.equal(v, first[name])}
    assert moved | FROZEN | {"discriminator.2.bias"} == tensors.model.keys()
    assert tensors.exp_avg.keys() == tensors.model.keys() - FROZEN
    norms = logged(whole, "optim/grad_norm", "optim/grad_norm_discriminator")
    assert all(0 < own < both for both, own in norms)
