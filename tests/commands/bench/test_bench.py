"""`bench`: what it prints, and that the pipeline keeps its distance to the ceilings.

The bounds are what a shared, noisy machine must show in the best of three medians; the goals, and
what was measured on an idle one, stand in docs/benchmarks.md. `make soak` asks for more than the
other lanes.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from benchmarks.pictures import make_pictures
from pipeline.checkpoints.folder import RunState, save_checkpoint
from pipeline.common import strict
from pipeline.config import TrainConfig
from pipeline.data.index import Index, build_index
from pipeline.data.index.splits import SplitSpec
from pipeline.distributed.strategies.base import FullState
from pipeline.models.autoencoder import build_autoencoder
from tests.processes import ROOT

CONFIG = """
run_dir: {folder}/run
data:
  path: {folder}/tar
  split: all
  decode: {{kind: image, size: {size}}}
  threads: 2
  lanes: 16
model:
  backbone: {{kind: {backbone}}}
  bottleneck: {{kind: gaussian, size: 10}}
  likelihood: {{kind: bernoulli}}
corruptions: [{{kind: masking}}]
objective: {{regularisers: [{{kind: kl}}]}}
evaluation: {{split: all}}
batch_size: {batch_size}
"""


def write_config(folder: Path, size: int, count: int, batch_size: int) -> Path:
    make_pictures(folder, size=size, count=count, seed=0)
    build_index(folder / "tar", split=SplitSpec(fractions={"train": 1.0}))
    backbone = "burgess" if size == 64 else "mlp"
    text = CONFIG.format(folder=folder, size=size, backbone=backbone, batch_size=batch_size)
    path = folder / "config.yaml"
    path.write_text(text)
    return path


def bench(*arguments: object) -> dict:
    argv = [sys.executable, "-m", "pipeline", "bench", *map(str, arguments), "--json"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def best_of_three(measure, good) -> dict:
    """The first result that is good enough, or the third."""
    for _ in range(3):
        result = measure()
        print(json.dumps(result))
        if good(result):
            break
    return result


@pytest.fixture(scope="module")
def config_of(tmp_path_factory) -> Callable[[int], Path]:
    """A config, by the size of the pictures that it reads, which are made when first asked for."""

    @cache
    def make(size: int) -> Path:
        count, batch_size = (6000, 256) if size == 64 else (1500, 64)
        return write_config(tmp_path_factory.mktemp("bench") / "data", size, count, batch_size)

    return make


@pytest.fixture
def small(config_of) -> Path:
    return config_of(64)


@pytest.mark.alone
def test_bench_data_names_every_stage_and_the_bottleneck(small):
    result = bench("data", small, "--images", 512, "--rounds", 1, "data.threads=1")
    stages = ["read", "read + parse", "decode (ceiling)", "stream", "stream + corruption"]
    assert list(result["images_per_second"]) == list(result["share_of_ceiling"]) == stages
    assert all(rate > 0 for rate in result["images_per_second"].values())
    assert result["share_of_ceiling"]["decode (ceiling)"] == 1
    assert (result["images_per_round"], result["threads"], result["rounds"]) == (512, 1, 1)
    assert result["bottleneck"].partition(":")[0] in ("corruption", "decoding", "reading") or (
        result["bottleneck"] == "Python between the parts"
    )


@pytest.mark.alone
@pytest.mark.parametrize(
    "size, bound", [(64, 0.65), pytest.param(256, 0.85, marks=pytest.mark.soak)]
)
def test_the_stream_runs_near_the_decode_ceiling(size, bound, config_of):
    config, images = config_of(size), 8192 if size == 64 else 2048

    def measure():
        return bench("data", config, "--images", images, "corruptions=[]")

    def good(result):
        return result["share_of_ceiling"]["stream"] >= bound

    assert good(best_of_three(measure, good))


@pytest.mark.alone
@pytest.mark.parametrize("share", [0.7, pytest.param(0.85, marks=pytest.mark.soak)])
def test_training_runs_near_a_bare_loop(small, share):
    def measure():
        return bench("train", small, "--steps", 6, "batch_size=128")

    def good(result):
        return min(result["share_of_bare_loop"].values()) >= share

    result = best_of_three(measure, good)
    assert good(result)
    assert set(result["share_of_bare_loop"]) == {"with corruption", "without corruption"}
    assert max(result["data_wait"].values()) < 0.05


@pytest.mark.alone
def test_the_training_waits_for_a_part_of_a_save_only(small):
    """The goal is 0.2; a model of 50 MB, so that the disk's flush does not decide alone."""
    model = "model.backbone={kind: mlp, hidden: [128]}"

    def measure():
        settings = ("--steps", 4, "--rounds", 3, "batch_size=64", model)
        return bench("train", small, "--checkpoint", *settings)

    def good(result):
        return result["stall_over_whole"] < 0.5

    result = best_of_three(measure, good)
    assert good(result)
    assert result["whole_save"] > result["plain_torch_save"] > 0
    assert result["state_bytes"] > 30e6
    assert result["training_rate_while_writing"] > 0
    assert not (small.parent / "run").exists()


def write_export_config(train: Path, tmp_path: Path) -> Path:
    """A run with the model of a config, untrained, and the config of its export."""
    run_dir = tmp_path / "run"
    config = strict.load(TrainConfig, train, [f"run_dir={run_dir}"])
    shape = config.data.decode.event_shape
    model = build_autoencoder(config.model, shape, seed=0, dtype=torch.float32)
    weights = {name: value.detach() for name, value in model.state_dict().items()}
    tensors = FullState(model=weights, ema=weights, exp_avg={}, exp_avg_sq={}, num_updates=1)
    dataset_id = Index.open(config.data.sources[0].path).dataset_id
    state = RunState(1, 1, 1, "order", dataset_id, 1, {})
    save_checkpoint(run_dir / "checkpoints", state, tensors)
    (run_dir / "config.yaml").write_text(strict.dump(config))
    path = tmp_path / "export.yaml"
    path.write_text(f"run: {run_dir}\nout: {tmp_path}/out\nbatch_size: 64\n")
    return path


# In test-all the small pictures; the others are soak, and so are the goals.
@pytest.mark.alone
@pytest.mark.parametrize(
    "size, share",
    [(64, 0.7), *(pytest.param(n, 0.75, marks=pytest.mark.soak) for n in (64, 256))],
)
def test_the_export_runs_near_what_decoding_and_encoding_leave(size, share, config_of, tmp_path):
    """The goal is 0.75, on a machine that does nothing else."""
    config = write_export_config(config_of(size), tmp_path)

    def measure():
        return bench("export", config, "--rounds", 3, "--processes", 2)

    def good(result):
        return result["share_of_bound"] >= share

    result = best_of_three(measure, good)
    assert good(result)
    rates = result["images_per_second"]
    assert list(rates) == ["decode (ceiling)", "encode (ceiling)", "export"]
    bound = 1 / (1 / rates["decode (ceiling)"] + 1 / rates["encode (ceiling)"])
    assert result["bound"] == pytest.approx(bound)
    assert result["share_of_bound"] == pytest.approx(rates["export"] / bound)
    assert (result["processes"], result["device"]) == (2, "cpu")
    assert result["images_per_round"] == (6000 if size == 64 else 1500)
    assert {path.name for path in tmp_path.iterdir()} == {"run", "export.yaml"}  # nothing is left
