"""LPIPS, Frechet and kernel distance beside their published arithmetic, and what is refused."""

import json
import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from scipy.linalg import sqrtm
from sklearn.datasets import load_sample_image
from torch.profiler import ProfilerActivity, profile

from pipeline.common.errors import UserError
from pipeline.distributed.runtime import Runtime
from pipeline.evaluation.reconstruction import Measurement, MetricSums, evaluating, networks_of
from pipeline.metrics import EvaluatedBatch
from pipeline.metrics.frechet import Frechet
from pipeline.metrics.images import levels_of
from pipeline.metrics.kid import KernelDistance, kernel_distance
from pipeline.metrics.lpips import Lpips
from pipeline.metrics.network import IMAGES_AT_ONCE, INCEPTION_SHA256
from pipeline.models.likelihoods import SquaredError
from pipeline.models.lpips import LINEAR, load_lpips, smallest_size
from pipeline.models.weights_file import WeightsFile
from pipeline.training.build import make_forward
from tests.distributed.test_equivalence import config
from tests.evaluation.network_worker import recorded_rows
from tests.evaluation.networks import (
    FlaggedFeatures,
    MapFeatures,
    SmallFeatures,
    WideFeatures,
    efficientnet,
    given,
    random_trunk,
    saved_script,
)
from tests.evaluation.test_reconstruction import config_of, index, model_of, stream_of

__all__ = ["config", "index"]  # fixtures
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("networks")


@pytest.fixture(scope="module")
def small(folder):
    return saved_script(SmallFeatures(), folder / "small.pt")


@pytest.fixture(scope="module")
def alex(folder):
    return random_trunk("alex", folder / "alex.pth")


def pictures(count=IMAGES_AT_ONCE + 5, channels=3, size=40):
    generator = torch.Generator().manual_seed(3)
    clean = levels_of(torch.rand(count, channels, size, size, generator=generator)) / 255
    return clean, clean + 0.2 * torch.randn(clean.shape, generator=generator)


def batch_of(metrics, clean, decoded, weight=None):
    return EvaluatedBatch(
        uid=torch.arange(len(clean)),
        weight=torch.ones(len(clean)) if weight is None else weight,
        clean=clean,
        corrupted=clean,
        mean=decoded,
        sample=decoded,
        output=None,
        losses=None,
        likelihood=SquaredError(),
        model=lambda *_, **__: None,
        networks=networks_of(metrics, CPU),
    )


def value_of(metric, batch):
    rows = metric.rows(batch)
    return metric.value(metric.sums(batch), None if rows is None else rows[batch.weight > 0])


def published_frechet(x, y):
    """As pytorch-fid has it."""
    covariances = [np.cov(it, rowvar=False) for it in (x, y)]
    root = np.real(sqrtm(covariances[0] @ covariances[1]))
    difference = x.mean(0) - y.mean(0)
    return difference @ difference + np.trace(covariances[0] + covariances[1] - 2 * root)


def published_kernel(x, y):
    """A loop over all pairs of different numbers."""
    count, size, total = len(x), x.shape[1], 0.0
    for i, j in product(range(count), repeat=2):
        for a, b, sign in ((x, x, 1), (y, y, 1), (x, y, -2)):
            dot = math.fsum(float(p) * float(q) for p, q in zip(a[i], b[j], strict=True))
            total += sign * (dot / size + 1) ** 3 * (i != j)
    return total / (count * (count - 1))


def published_lpips(state, trunk, x, y):
    """The distance of images in [0, 1] in float64, from convolutions by number."""
    pools, strides = (
        {"alex": (2, 5), "vgg": (4, 9, 16, 23)}[trunk],
        {0: 4} if trunk == "alex" else {},
    )
    taps = {"alex": (1, 4, 7, 9, 11), "vgg": (3, 8, 15, 22, 29)}[trunk]
    linear, total = load_file(LINEAR), 0.0
    shift = torch.tensor([-0.030, -0.088, -0.188], dtype=torch.float64).view(3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450], dtype=torch.float64).view(3, 1, 1)
    maps = [(2 * it.double() - 1 - shift) / scale for it in (x, y)]
    for number in range(max(taps) + 1):
        if (name := f"features.{number}.weight") in state:
            weight, bias = (state[n].double() for n in (name, f"features.{number}.bias"))
            padding = {11: 2, 5: 2, 3: 1}[weight.shape[-1]]
            stride = strides.get(number, 1)
            maps = [F.conv2d(it, weight, bias, stride, padding).relu() for it in maps]
        elif number in pools:
            maps = [F.max_pool2d(it, 3 if trunk == "alex" else 2, 2) for it in maps]
        if number in taps:
            units = [it / (it.norm(dim=1, keepdim=True) + 1e-10) for it in maps]
            weight = linear[f"{trunk}.{taps.index(number)}"].double().view(-1, 1, 1)
            total = total + ((units[0] - units[1]) ** 2 * weight).sum(1).mean((1, 2))
    return total


def assert_as_published(metric, name, clean, decoded, *, rtol):
    [(label, found)] = metric.per_image(batch_of([metric], clean, decoded)).items()
    state = torch.load(metric.weights.path, weights_only=True)
    expected = published_lpips(state, metric.trunk, clean, levels_of(decoded) / 255)
    print(f"{name}, {clean.dtype}: {float((found / expected - 1).abs().max()):.1e}")
    assert label == name
    torch.testing.assert_close(found.double(), expected, rtol=rtol, atol=0)


@pytest.mark.parametrize("size", [smallest_size("alex"), 67])
def test_lpips_alex_equals_the_published_arithmetic(alex, size):
    metric = Lpips(weights=alex)
    clean, decoded = pictures(size=size)
    assert_as_published(metric, "lpips_alex", clean, decoded, rtol=1e-5)
    assert_as_published(metric, "lpips_alex", clean.double(), decoded.double(), rtol=1e-6)
    same = metric.per_image(batch_of([metric], clean, clean))["lpips_alex"]
    assert same.tolist() == [0.0] * len(clean)


def test_lpips_vgg_equals_the_published_arithmetic(folder):
    weights = random_trunk("vgg", folder / "vgg.pth")
    metric = Lpips(trunk="vgg", weights=weights, decodes="sample")
    clean, decoded = pictures(count=3, size=35)
    assert_as_published(metric, "lpips_vgg_sample", clean, decoded, rtol=1e-5)


def test_a_grey_picture_is_one_of_three_equal_channels(alex, small):
    clean, decoded = pictures(channels=1)
    for metric in (Lpips(weights=alex), Frechet(network=small), KernelDistance(network=small)):
        grey = batch_of([metric], clean, decoded)
        colour = batch_of([metric], clean.repeat(1, 3, 1, 1), decoded.repeat(1, 3, 1, 1))
        if isinstance(metric, Lpips):
            assert torch.equal(*(metric.per_image(it)[metric.label] for it in (grey, colour)))
        else:
            assert value_of(metric, grey) == value_of(metric, colour)


@pytest.mark.parametrize("trunk", ["alex", "vgg"])
def test_the_smallest_picture_is_the_smallest_that_the_trunk_takes(folder, trunk):
    weights = WeightsFile(**random_trunk(trunk, folder / f"least_{trunk}.pth"))
    network, least = load_lpips(trunk, weights), smallest_size(trunk)
    assert least == {"alex": 31, "vgg": 16}[trunk]
    assert network(*torch.rand(2, 1, 3, least, least)).isfinite().all()
    with pytest.raises(RuntimeError, match="too small"):
        network(*torch.rand(2, 1, 3, least - 1, least - 1))


def test_frechet_equals_scipy_and_numpy(small):
    metric = Frechet(network=small)
    clean, decoded = pictures(count=60)
    weight = torch.ones(60)
    weight[50:] = 0  # slots without a sample
    batch = batch_of([metric], clean, decoded, weight)
    found = value_of(metric, batch)[metric.label]
    x, y = (SmallFeatures()(levels_of(it)[:50].to(torch.uint8)).numpy() for it in (clean, decoded))
    assert found == pytest.approx(published_frechet(x, y), rel=1e-8)
    assert metric.label == f"fd_small_{small['sha256'][:8]}"
    same = value_of(metric, batch_of([metric], clean, clean))[metric.label]
    assert abs(same) < 1e-10


def test_frechet_of_features_far_from_zero():
    """The sums of squares lose what the comment in `Frechet.sums` says, and no more."""
    rows = recorded_rows(500).unbind(1)
    shifted = [(it + 1e4).float().double() for it in rows]
    sums = {"images": torch.tensor(500)}
    for name, features in zip(("clean", "decoded"), shifted, strict=True):
        sums |= {name: features.sum(0), f"{name}_products": features.T @ features}
    network = {"path": "any.pt", "sha256": "0" * 64}
    [found] = Frechet(network=network).value(sums, None).values()
    assert found == pytest.approx(published_frechet(*(it.numpy() for it in shifted)), rel=1e-6)


def test_frechet_of_few_images_warns_and_of_none_is_no_number(small):
    metric = Frechet(network=small)
    for count, warns in ((9, False), (8, True), (1, True)):
        clean, decoded = pictures(count=count)
        batch = batch_of([metric], clean, decoded)
        remarks = metric.remarks(metric.sums(batch))
        assert bool(remarks) == warns
        assert math.isnan(value_of(metric, batch)[metric.label]) == (count == 1)
    assert "is of 1 images, but its features have 8 values" in remarks[0]
    assert math.isnan(KernelDistance(network=small).value({}, None).popitem()[1])


def test_kernel_distance_equals_a_loop_over_pairs(monkeypatch):
    monkeypatch.setattr("pipeline.metrics.kid.ROWS_AT_ONCE", 7)
    x, y = recorded_rows(24).unbind(1)
    expected = published_kernel(x.numpy(), y.numpy())
    assert kernel_distance(x, y) == pytest.approx(expected, rel=1e-12)
    assert kernel_distance(x, x) == 0
    # Two independent samples of one distribution: no bias, whatever the sample's size.
    generator = torch.Generator().manual_seed(2)
    draws = [kernel_distance(*torch.randn(2, 10, 4, generator=generator)) for _ in range(3000)]
    assert abs(np.mean(draws)) < 4 * np.std(draws) / math.sqrt(len(draws))


def test_one_network_serves_both_metrics_and_runs_once(small):
    metrics = [Frechet(network=small), KernelDistance(network=small)]
    clean, decoded = pictures()
    batch = batch_of(metrics, clean, decoded)
    [network] = batch.networks.values()
    calls = []
    network.register_forward_hook(lambda *_: calls.append(1))
    for metric in metrics:
        value_of(metric, batch)
    assert len(calls) == 2 * 2  # two parts of images, and of reconstructions


def test_a_network_that_can_return_features_is_asked_for_them(small, folder):
    flagged = saved_script(FlaggedFeatures(), folder / "flagged.pt")
    clean, decoded = pictures()
    found = [
        value_of(metric, batch_of([metric], clean, decoded))[metric.label]
        for metric in (Frechet(network=small), Frechet(network=flagged))
    ]
    assert found[0] == found[1]


def test_only_the_file_of_nvidia_is_called_fid():
    known = {"path": "inception-2015-12-05.pt", "sha256": INCEPTION_SHA256.upper()}
    assert Frechet(network=known).label == "fid"
    assert Frechet(network=known, decodes="sample").label == "fid_sample"
    assert KernelDistance(network=known).label == "kid"
    other = known | {"sha256": "0" * 64}
    assert Frechet(network=other).label == "fd_inception_2015_12_05_00000000"
    assert KernelDistance(network=other | {"name": "mine"}).label == "kid_mine_00000000"


def test_the_offline_network_knows_two_photos_and_orders_damage(folder):
    network = efficientnet()
    photos = []
    for name, label in (("china.jpg", 698), ("flower.jpg", 985)):
        photo = Image.fromarray(load_sample_image(name))
        edge = (photo.width - photo.height) // 2
        photo = photo.crop((edge, 0, edge + photo.height, photo.height))
        photo = photo.resize((224, 224), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(photo)).permute(2, 0, 1)
        photos.append(pixels)
        with torch.no_grad():
            chances = network(pixels[None]).softmax(1)[0]
        print(name, int(chances.argmax()), f"{float(chances.max()):.2f}")
        assert int(chances.argmax()) == label
    file = saved_script(network, folder / "lite0.pt")
    metrics = [Frechet(network=file), KernelDistance(network=file)]
    patches = torch.cat([p.unfold(1, 56, 56).unfold(2, 56, 56).flatten(1, 2) for p in photos], 1)
    clean = patches.movedim(1, 0).float() / 255
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(4))
    for metric in metrics:
        with torch.no_grad():
            found = [
                value_of(metric, batch_of(metrics, clean, clean + sigma * noise))[metric.label]
                for sigma in (0.02, 0.1, 0.3)
            ]
        print(metric.label, *(f"{it:.4g}" for it in found))
        assert found == sorted(found)


METRICS = (
    "[{{kind: lpips, weights: {alex}}}, {{kind: frechet, network: {small}}}, "
    "{{kind: kid, network: {small}, images: 12}}]"
)


@pytest.mark.timeout(300)
def test_two_and_three_processes_equal_one(run_processes, config, alex, small, tmp_path):
    metrics = METRICS.format(alex=json.dumps(alex), small=json.dumps(small))
    settings = (f"evaluation.metrics={metrics}", "data.decode.size=32", "batch_size=12")
    found = {}
    for world in (None, 2, 3):
        out = tmp_path / f"{world}.json"
        result = run_processes("tests.evaluation.network_worker", world, out, config, *settings)
        assert result.code == 0, result.output
        found[world] = json.loads(out.read_text())
    one = found.pop(None)
    assert {"eval/lpips_alex", f"eval/fd_small_{small['sha256'][:8]}"} <= one["fp64"].keys()
    x, y = (it.numpy() for it in recorded_rows().unbind(1))
    frechet = one["recorded"][f"fd_small_{small['sha256'][:8]}"]
    assert frechet == pytest.approx(published_frechet(x, y), rel=1e-9)
    for world, several in found.items():
        for part, bound in (("fp64", 1e-10), ("fp32", 1e-5), ("recorded", 1e-12)):
            apart = {n: abs(several[part][n] / v - 1) for n, v in one[part].items() if v}
            worst = max(apart, key=lambda it: apart[it])
            print(f"{world} processes, {part}: {worst} {apart[worst]:.1e}")
            assert several[part] == pytest.approx(one[part], rel=bound)


def peak_of(work):
    """The most bytes of tensors that `work` had at once, besides those there before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = profiler.profiler.kineto_results.events()
    sizes = [(it.start_ns(), it.nbytes()) for it in events if it.name() == "[memory]"]
    held = np.cumsum([size for _, size in sorted(sizes, key=lambda it: it[0])])
    return int(held.max())


def evaluate(config, model, batch, metrics):
    """An evaluation of two micro-batches, with the networks that it needs."""
    networks, forward = networks_of(metrics, CPU), make_forward(config, CPU)
    weights = config.objective.weights_at(0)
    measurement = Measurement(forward, metrics, weights=weights, networks=networks)
    with evaluating(model):
        measurement.add(model, batch)
        measurement.add(model, batch)
    return measurement.result(Runtime.start(accumulation=1))


def train(config, model, batch):
    """Gradients of a micro-batch."""
    forward = make_forward(config, CPU)
    inputs = forward.inputs(batch, "train")
    forward.run(model, inputs, weights=config.objective.weights_at(0))[1].total.sum().backward()


@torch.no_grad()
def networks_alone(metrics, size):
    """What the metrics compute from two micro-batches, of pictures of their own."""
    tallies = [MetricSums(metric) for metric in metrics]
    networks = networks_of(metrics, CPU)
    for _ in range(2):
        seen = batch_of((), *pictures(count=8, size=size))
        seen = replace(seen, networks=networks)
        for tally in tallies:
            tally.add(seen)
    for tally in tallies:
        tally.value(Runtime.start(accumulation=1))


@pytest.mark.parametrize("widths", [[64, 128], [8, 8]])
def test_the_peak_is_that_of_a_training_micro_batch_and_the_networks(
    tiny_shards, index, alex, folder, widths
):
    """Of a model that is large beside the networks, and of one that is small."""
    file = saved_script(efficientnet(), folder / "lite0_again.pt")
    config = config_of(
        tiny_shards,
        model={
            "backbone": {"kind": "resnet", "widths": widths, "blocks": 1, "groups": 4},
            "bottleneck": {"kind": "gaussian", "size": 4},
            "likelihood": {"kind": "gaussian"},
        },
        batch_size=8,
        evaluation={
            "metrics": [
                {"kind": "lpips", "weights": alex},
                {"kind": "frechet", "network": file},
                {"kind": "kid", "network": file},
            ]
        },
    )
    model, metrics = model_of(config), config.evaluation.metrics
    with stream_of(config, index) as stream:
        batch = next(iter(stream)).copy()
    training = peak_of(lambda: train(config, model, batch))
    model.zero_grad(set_to_none=True)
    own = peak_of(lambda: networks_alone(metrics, config.data.decode.size))
    found = peak_of(lambda: evaluate(config, model, batch, metrics))
    plain = peak_of(lambda: evaluate(config, model, batch, ()))
    for name, peak in zip(
        ("training", "networks", "evaluation", "without"),
        (training, own, found, plain),
        strict=True,
    ):
        print(f"{widths}: {name} {peak / 2**20:.1f} MiB")
    assert found > own / 2  # the networks are counted
    assert plain <= training
    assert found <= training + own


def wrong_file(folder, small, alex):
    """Settings of a metric, and words of its refusal."""
    missing = {"path": str(folder / "none.pt"), "sha256": "0" * 64}
    text = folder / "text.pt"
    text.write_text("no network")
    other = small | {"sha256": "1" * 64}
    shuffled = folder / "shuffled.pth"
    state = torch.load(alex["path"], weights_only=True)
    torch.save({n.replace("features.", "layers."): v for n, v in state.items()}, shuffled)
    return {
        "another digest": (Frechet(network=other), [small["sha256"], "1" * 64, small["path"]]),
        "missing": (KernelDistance(network=missing), ["No such file", missing["path"]]),
        "no script": (Frechet(network=given(text)), ["holds no TorchScript network"]),
        "no state dict": (Lpips(weights=given(text)), ["holds no state dict of tensors"]),
        "a script as trunk": (Lpips(weights=small), ["holds no state dict of tensors"]),
        "other names": (Lpips(weights=given(shuffled)), ["features.0.weight is missing"]),
        "other trunk": (Lpips(trunk="vgg", weights=alex), ["(64, 3, 11, 11)", "(64, 3, 3, 3)"]),
    }


def test_a_file_that_is_not_the_network_is_refused(folder, small, alex):
    for name, (metric, words) in wrong_file(folder, small, alex).items():
        with pytest.raises(UserError) as error:
            networks_of([metric], CPU)
        print(name, "|", error.value)
        assert all(word in str(error.value) for word in words), name
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (MapFeatures, "gave float64 [16, 8, 10, 10], but"),
        (WideFeatures, "failed:"),
    ],
)
def test_a_network_that_gives_no_features_is_refused(folder, network, words):
    file = saved_script(network(), folder / f"{network.__name__}.pt")
    metric = Frechet(network=file)
    with pytest.raises(UserError) as error:
        metric.sums(batch_of([metric], *pictures()))
    print(error.value)
    assert words in str(error.value)
    assert file["path"] in str(error.value)


def test_data_that_a_network_cannot_take_is_refused(tiny_shards, small, alex):
    array = {"kind": "array", "shape": [5, 32, 32], "range": [0, 1]}
    for metric, decode, words in (
        ({"kind": "lpips", "weights": alex}, array, "metric lpips compares pictures"),
        ({"kind": "frechet", "network": small}, array, "metric frechet compares pictures"),
        ({"kind": "kid", "network": small}, array, "metric kid compares pictures"),
        (
            {"kind": "lpips", "weights": alex},
            {"kind": "image", "size": 30},
            "at least 31 x 31 pixels, but they have 30 x 30",
        ),
        (
            {"kind": "lpips", "trunk": "vgg", "weights": alex},
            {"kind": "image", "size": [64, 15]},
            "at least 16 x 16 pixels, but they have 64 x 15",
        ),
    ):
        settings = {"data": {"path": str(tiny_shards), "decode": decode}}
        with pytest.raises(ValueError, match="metric") as error:
            config_of(tiny_shards, **settings, evaluation={"metrics": [metric]})
        assert words in str(error.value)
    with pytest.raises(UserError, match="64 hexadecimal digits"):
        Frechet(network=small | {"sha256": "abc"})
