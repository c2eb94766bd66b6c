"""PSNR and SSIM beside scikit-image, active units and KL beside numpy, and what is refused."""

import math

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from pipeline.common.errors import UserError
from pipeline.distributed.runtime import Runtime
from pipeline.evaluation.reconstruction import MetricSums
from pipeline.metrics import EvaluatedBatch
from pipeline.metrics.active_units import ActiveUnits
from pipeline.metrics.images import levels_of
from pipeline.metrics.kl_per_dimension import KlPerDimension
from pipeline.metrics.likelihood import LogLikelihood
from pipeline.metrics.psnr import Psnr
from pipeline.metrics.ssim import VALUES_AT_ONCE, Ssim, similarity, windowed
from pipeline.models.autoencoder import ModelOutput
from pipeline.models.bottlenecks import Code, Posterior
from pipeline.models.likelihoods import SquaredError
from tests.evaluation.test_reconstruction import config_of

COUNT = 23


@pytest.fixture(scope="module")
def runtime():
    return Runtime.start(accumulation=1)


def batch_of(clean, mean, sample=None, weight=None, posterior=None):
    """A micro-batch as an evaluation gives it to metrics."""
    count = len(clean)
    return EvaluatedBatch(
        uid=torch.arange(count),
        weight=torch.ones(count) if weight is None else weight,
        clean=clean,
        corrupted=clean,
        mean=mean,
        sample=mean if sample is None else sample,
        output=ModelOutput(Code(clean, posterior), mean, {}),
        losses=None,
        likelihood=SquaredError(),
        model=lambda *_, **__: None,
        networks={},
    )


def value_of(metric, runtime, *batches):
    sums = MetricSums(metric)
    for batch in batches:
        sums.add(batch)
    return sums.value(runtime), sums.vectors


def images(channels=3, height=40, width=37, dtype=torch.float32):
    """Smooth pictures with plain parts, and reconstructions that leave [0, 1]."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(COUNT, channels, 6, 5, generator=generator, dtype=dtype)
    clean = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    clean[:, :, : height // 3] = 0.5
    noise = torch.randn(clean.shape, generator=generator, dtype=dtype)
    strength = torch.rand(COUNT, 1, 1, 1, generator=generator, dtype=dtype)
    return levels_of(clean) / 255, clean + 0.3 * strength**2 * noise


def saved(x):
    """What a PNG file holds: bytes, half to even, by numpy; [B, H, W, C]."""
    scaled = np.clip(x.numpy(), 0, 1) * x.numpy().dtype.type(255)
    return np.rint(scaled).astype(np.uint8).transpose(0, 2, 3, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_psnr_equals_that_of_scikit_image(runtime, dtype):
    clean, decoded = images(dtype=dtype)
    pairs = [*zip(saved(clean), saved(decoded), strict=True)]
    expected = [peak_signal_noise_ratio(x, y, data_range=255) for x, y in pairs]
    parts = [batch_of(x, y) for x, y in zip(clean.split(7), decoded.split(7), strict=True)]
    found, _ = value_of(Psnr(), runtime, *parts)
    mean_squared_error = np.mean([((x / 255 - y / 255) ** 2).mean() for x, y in pairs])
    assert found["psnr"] == pytest.approx(np.mean(expected), rel=1e-12)
    assert found["psnr_pooled"] == pytest.approx(-10 * math.log10(mean_squared_error), rel=1e-12)
    assert found["psnr"] > found["psnr_pooled"] + 0.5  # the means are not the same
    per_image = Psnr().per_image(batch_of(clean, decoded))["psnr"]
    assert per_image.tolist() == pytest.approx(expected, rel=1e-12)


def test_equal_pictures_have_100_db(runtime):
    clean, _ = images()
    almost = clean + 0.4 / 255  # the same as saved
    found, _ = value_of(Psnr(), runtime, batch_of(clean, almost))
    assert found == {"psnr": 100.0, "psnr_pooled": 100.0}
    found, _ = value_of(Ssim(), runtime, batch_of(clean, almost))
    assert found["ssim"] == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(("channels", "height", "width"), [(3, 40, 37), (1, 64, 64), (3, 11, 12)])
def test_ssim_equals_that_of_scikit_image(runtime, channels, height, width):
    clean, decoded = images(channels, height, width)
    expected = [
        structural_similarity(
            x / 255,
            y / 255,
            data_range=1,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            channel_axis=-1,
            full=True,
        )[1][5:-5, 5:-5].mean()  # the windows inside the image
        for x, y in zip(saved(clean), saved(decoded), strict=True)
    ]
    per_image = Ssim().per_image(batch_of(clean, decoded))["ssim"]
    apart = np.abs(per_image.numpy() - expected).max()
    print(f"SSIM of {channels} x {height} x {width}: at most {apart:.1e} apart")
    assert apart < 1e-12
    found, _ = value_of(Ssim(), runtime, batch_of(clean, decoded))
    assert found["ssim"] == pytest.approx(np.mean(expected), abs=1e-12)


def test_ssim_of_one_window_is_its_formula():
    generator = torch.Generator().manual_seed(3)
    x, y = torch.rand(2, 11, 11, generator=generator, dtype=torch.float64)
    weights = [
        [math.exp(-((i - 5) ** 2 + (j - 5) ** 2) / (2 * 1.5**2)) for j in range(11)]
        for i in range(11)
    ]
    total = sum(map(sum, weights))

    def mean(value):
        return sum(
            weights[i][j] / total * value(float(x[i, j]), float(y[i, j]))
            for i in range(11)
            for j in range(11)
        )

    mean_x, mean_y = mean(lambda a, _: a), mean(lambda _, b: b)
    variance_x = mean(lambda a, _: (a - mean_x) ** 2)
    variance_y = mean(lambda _, b: (b - mean_y) ** 2)
    covariance = mean(lambda a, b: (a - mean_x) * (b - mean_y))
    expected = (2 * mean_x * mean_y + 0.01**2) * (2 * covariance + 0.03**2)
    expected /= (mean_x**2 + mean_y**2 + 0.01**2) * (variance_x + variance_y + 0.03**2)
    found = float(similarity(x[None, None], y[None, None]))
    assert found == pytest.approx(expected, rel=1e-12)
    plain = windowed(torch.ones(11, 12, dtype=torch.float64))
    assert plain[0].tolist() == pytest.approx([1, 1], abs=1e-15)
    assert plain.shape == (1, 2)


def test_ssim_is_the_same_in_parts(monkeypatch):
    clean, decoded = images()
    whole = Ssim().per_image(batch_of(clean, decoded))["ssim"]
    assert clean.numel() < VALUES_AT_ONCE
    monkeypatch.setattr("pipeline.metrics.ssim.VALUES_AT_ONCE", 2 * clean[0].numel() + 5)
    assert torch.equal(Ssim().per_image(batch_of(clean, decoded))["ssim"], whole)


def test_one_sample_of_the_posterior_has_its_own_names(runtime):
    clean, decoded = images()
    batch = batch_of(clean, clean, sample=decoded)
    for kind, names in ((Psnr, ["psnr", "psnr_pooled"]), (Ssim, ["ssim"])):
        by_mean, _ = value_of(kind(), runtime, batch)
        by_sample, _ = value_of(kind(decodes="sample"), runtime, batch)
        other, _ = value_of(kind(), runtime, batch_of(clean, decoded))
        assert list(by_mean) == names
        assert by_sample == {f"{name}_sample": value for name, value in other.items()}
        assert by_sample[f"{names[0]}_sample"] < by_mean[names[0]]


def latents(*shape):
    """Means and log-variances; the variance of the means is 0.0001, 0.0004 ..., about 30."""
    generator = torch.Generator().manual_seed(2)
    mu, logvar = torch.randn(2, COUNT, *shape, generator=generator)
    scale = torch.logspace(-4, 1.5, shape[0]).sqrt().view(-1, *[1] * (len(shape) - 1))
    return 1000 + scale * mu, logvar - 1


@pytest.mark.parametrize("shape", [(16,), (8, 3, 5)])
def test_active_units_and_kl_equal_numpy(runtime, shape):
    mu, logvar = latents(*shape)
    mu = mu - 1000 * (torch.arange(shape[0]) % 2).view(-1, *[1] * (len(shape) - 1))
    weight = torch.ones(COUNT)
    weight[[3, 11]] = 0  # no samples, and what is there may be anything
    counted = weight > 0
    bad_mu = mu.clone()
    bad_mu[~counted] = torch.inf
    parts = [
        batch_of(
            bad_mu[part], bad_mu[part], None, weight[part], Posterior(bad_mu[part], logvar[part])
        )
        for part in (slice(0, 4), slice(4, COUNT))
    ]
    m, v = (it[counted].double().numpy() for it in (mu, logvar))
    others = (0, *range(2, m.ndim))  # samples and positions
    expected = int((m.var(axis=others) > 0.01).sum())
    assert 0 < expected < shape[0]
    found, _ = value_of(ActiveUnits(), runtime, *parts)
    assert found == {"active_units": expected}
    kl = 0.5 * (m**2 + np.exp(v) - 1 - v)
    kl = kl.sum(axis=tuple(range(2, m.ndim))).mean(axis=0)
    found, vectors = value_of(KlPerDimension(), runtime, *parts)
    assert vectors["kl_per_dimension"] == pytest.approx(kl, rel=1e-6)
    assert found == pytest.approx(
        {
            "kl_per_dimension_max": kl.max(),
            "kl_per_dimension_median": np.median(kl),
            "kl_per_dimension_min": kl.min(),
        },
        rel=1e-6,
    )
    whole, _ = value_of(LogLikelihood(), runtime, *parts)
    assert sum(vectors["kl_per_dimension"]) == pytest.approx(whole["kl"], rel=1e-6)


def refused(tiny_shards, metrics, decode=None, bottleneck="gaussian", **settings):
    """The words with which a config is refused."""
    data = {"path": str(tiny_shards), "decode": {"kind": "image", "size": 32, **(decode or {})}}
    if (decode or {}).get("kind") == "array":
        data["decode"] = decode
    evaluation = {"metrics": metrics}
    with pytest.raises((UserError, ValueError)) as caught:
        config_of(
            tiny_shards, "squared_error", bottleneck, data=data, evaluation=evaluation, **settings
        )
    return " ".join(str(caught.value).split())


@pytest.mark.parametrize(
    ("metric", "settings", "words"),
    [
        ("ssim", {"decode": {"size": 10}}, "windows of 11 x 11 pixels, but pictures have 10 x 10"),
        ("ssim", {"decode": {"size": [64, 8]}}, "pictures have 64 x 8 (data.decode.size)"),
        ("psnr", {"decode": {"channels": 4}}, "data.decode.channels is 4"),
        ("ssim", {"decode": {"dtype": "uint16"}}, "data.decode.dtype is uint16"),
        (
            "psnr",
            {"decode": {"kind": "array", "shape": [3, 32, 32], "range": [0, 1]}},
            "psnr compares pictures, but data.decode.kind is array",
        ),
        ("active_units", {"bottleneck": "deterministic"}, "active_units needs a density"),
        ("kl_per_dimension", {"bottleneck": "deterministic"}, "kl_per_dimension needs a density"),
        ("log_likelihood", {"monitor": {"rows_by": "kl"}}, "rank them by: none"),
        ("psnr", {"monitor": {"rows_by": "squared_error"}}, "rank them by: psnr"),
    ],
)
def test_what_has_no_meaning_is_refused(tiny_shards, metric, settings, words):
    assert words in refused(tiny_shards, [{"kind": metric}], **settings)


def test_a_sample_needs_a_density_and_a_figure_is_named_once(tiny_shards):
    sample = {"kind": "psnr", "decodes": "sample"}
    assert "needs a density to sample" in refused(tiny_shards, [sample], None, "deterministic")
    assert "names a figure twice" in refused(tiny_shards, [{"kind": "psnr"}, {"kind": "psnr"}])
    metrics = [{"kind": "psnr"}, sample, {"kind": "ssim"}]
    config = config_of(tiny_shards, evaluation={"metrics": metrics})
    labels = [metric.label for metric in config.evaluation.metrics]
    assert labels == ["psnr", "psnr_sample", "ssim"]
