"""Every setting of a training run is connected: changing it changes what can be seen of a run."""

import inspect
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, get_args

import pytest
import torch

from pipeline.common.component import Component
from pipeline.config import FORMER_DEFAULTS, MAY_CHANGE, TrainConfig
from pipeline.data.index import build_index
from pipeline.data.index.splits import SplitSpec
from pipeline.distributed.runtime import Runtime
from pipeline.training.build import make_strategy
from tests.activations import kept_bytes
from tests.config.networks import network_changes, write_networks
from tests.config.remote import REMOTE_CHANGES
from tests.config.runs import (
    Given,
    World,
    average,
    best,
    buffers,
    checkpoints,
    compiled,
    ended_at,
    ending,
    evaluated_steps,
    evaluation,
    logged_steps,
    losses,
    memory_format,
    picture_sizes,
    place,
    quarantined,
    shown,
    started,
    thread_names,
    wandb_run,
    watches,
    weights,
    write_shards,
)


def components(annotation: Any) -> Iterator[type[Component]]:
    """The component classes that a field's type names."""
    if inspect.isclass(annotation) and issubclass(annotation, Component):
        yield annotation
    for argument in get_args(annotation):
        yield from components(argument)


def leaves(tree: type[Component], path: str = "") -> Iterator[str]:
    """All settings: "a.b"; of a kind "a.KIND.b", and "a.KIND.kind" for choosing it."""
    for name, field in tree.model_fields.items():
        inner = list(dict.fromkeys(components(field.annotation)))
        is_section = len(inner) == 1 and "kind" not in inner[0].model_fields
        if not inner or (not isinstance(field.default, Component) and not is_section):
            yield f"{path}{name}"
        for component in inner:
            kind = component.model_fields.get("kind")
            yield from leaves(component, f"{path}{name}." + (f"{kind.default}." if kind else ""))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    tmp_path = tmp_path_factory.mktemp("runs")
    shards = tmp_path / "shards"
    write_shards(shards)
    shutil.copytree(shards / "index", tmp_path / "apart" / "index")
    other = tmp_path / "other"
    shutil.copytree(shards, other)
    (other / "3.tar").unlink()
    build_index(other, split=SplitSpec(fractions={"train": 0.6, "held_out": 0.4}))
    write_networks(tmp_path)
    return World(shards, tmp_path)


def kept_activations(world: World, given: Given) -> int:
    """Bytes that a forward pass of the run's model keeps for its backward."""
    config = world.config(given)
    model = make_strategy(config, Runtime.start(accumulation=1)).model
    return kept_bytes(lambda: model(torch.zeros(2, *config.data.decode.event_shape)))


class Change(NamedTuple):
    """With `given` and `changed` overrides a run looks different than with `given` alone."""

    changed: tuple[str, ...]
    seen: Callable[[World, Given], Any] = losses
    given: Given = ()


RARE_LOG = "monitor.log_every_steps=4"  # some steps hold no usable array
ARRAY = ("data.decode={kind: array, shape: [2, 3], range: [0, 1]}", RARE_LOG)
MASKED = "corruptions=[{kind: masking}]"
BURGESS = ("model.backbone={kind: burgess}", "data.decode.size=32")
RESNET = (
    "model.backbone={kind: resnet, widths: [4, 8], blocks: 1, groups: 4}",
    "data.decode.size=16",
)
TINY = "model.backbone={kind: tiny}"
SQUARED = "model.likelihood={kind: squared_error}"
SCHEDULE = "objective.regularisers=[{kind: kl, weight: {kind: linear, over_samples: 24}}]"
OFFLINE = "monitor.wandb.mode=offline"
RATE = "optimizer.learning_rate"


def corruption(kind: str, **settings: str) -> dict[str, Change]:
    """Choosing the kind, and each of its settings."""
    given = f"corruptions=[{{kind: {kind}}}]"
    if kind == "patch_mask":
        given = "corruptions=[{kind: patch_mask, patch_size: 4}]"
    rows = {f"corruptions.{kind}.kind": Change((given,))}
    for name, value in settings.items():
        path = f"corruptions.{kind}.{name}"
        rows[path] = Change((f"corruptions.0.{name}={value}",), given=(given,))
    return rows


def resnet(name: str, changed: str) -> dict[str, Change]:
    """One setting of the backbone."""
    return {f"model.backbone.resnet.{name}": Change((changed,), losses, RESNET)}


def augmentation(kind: str, required: str, **settings: str) -> dict[str, Change]:
    """Choosing the kind, and each of its settings."""
    given = f"data.augmentations=[{{kind: {kind}{required}}}]"
    rows = {f"data.augmentations.{kind}.kind": Change((given,))}
    for name, value in settings.items():
        path = f"data.augmentations.{kind}.{name}"
        rows[path] = Change((f"data.augmentations.0.{name}={value}",), given=(given,))
    return rows


def mixed(*parts: str) -> tuple[str, ...]:
    """Several data sets instead of one."""
    entries = ", ".join(f"{{path: {{tmp}}/{part}}}" for part in parts)
    return ("data.path=null", f"data.mixture=[{entries}]")


CHANGES: dict[str, Change] = {
    "run_dir": Change(("run_dir={tmp}/elsewhere",), place),
    "data.path": Change(("data.path={tmp}/other",)),
    "data.shards": Change(("data.shards={tmp}/shards",), ending, ("data.path={tmp}/apart",)),
    "data.mixture.path": Change(mixed("shards", "other"), given=mixed("shards", "shards")),
    "data.mixture.shards": Change(
        mixed("shards", "apart, shards: {tmp}/shards"), ending, mixed("shards", "apart")
    ),
    "data.mixture.weight": Change(
        mixed("shards, weight: 3", "other"), given=mixed("shards", "other")
    ),
    "data.augmentations": Change(("data.augmentations=[{kind: horizontal_flip}]",)),
    **augmentation("horizontal_flip", "", probability="1.0"),
    **augmentation("random_crop", ", shorter_side: 14", shorter_side="20"),
    **augmentation("random_resized_crop", "", scale="[0.5, 0.6]", ratio="[1, 1]"),
    "data.split": Change(("data.split=other",)),
    "data.decode.image.kind": Change(("data.decode={kind: image, size: 8}",), given=ARRAY),
    "data.decode.image.size": Change(("data.decode.size=10",)),
    "data.decode.image.channels": Change(("data.decode.channels=1",)),
    "data.decode.image.dtype": Change(("data.decode.dtype=uint16",)),
    "data.decode.image.suffixes": Change(("data.decode.suffixes=[webp]",), quarantined),
    "data.decode.image.resample": Change(("data.decode.resample=bilinear",)),
    "data.decode.image.background": Change(("data.decode.background=0",)),
    "data.decode.image.max_pixels": Change(("data.decode.max_pixels=100",), quarantined),
    "data.decode.array.kind": Change(ARRAY[:1], given=ARRAY[1:]),
    "data.decode.array.suffix": Change(("data.decode.suffix=b.npy",), given=ARRAY),
    "data.decode.array.shape": Change(("data.decode.shape=[3, 2]",), quarantined, ARRAY),
    "data.decode.array.dtype": Change(("data.decode.dtype=float16",), quarantined, ARRAY),
    "data.decode.array.range": Change(("data.decode.range=[0, 2]",), given=ARRAY),
    "data.lanes": Change(("data.lanes=2",)),
    "data.interleave": Change(("data.interleave=1",), given=("data.lanes=1", "data.window=4")),
    "data.window": Change(("data.window=1",)),
    "data.threads": Change(("data.threads=3",), thread_names),
    "data.read_threads": Change(("data.read_threads=3",), thread_names),
    "data.prefetch": Change(("data.prefetch=4",), buffers),
    "data.verify_checksums": Change(("data.verify_checksums=true",), ending),
    **{f"data.remote.{name}": Change(*row) for name, row in REMOTE_CHANGES.items()},
    "data.max_bad_fraction": Change(
        ("data.max_bad_fraction=0.0",), ending, ("data.decode.suffixes=[webp]",)
    ),
    "data.max_bad_in_row": Change(
        ("data.max_bad_in_row=0",), ending, ("data.decode.suffixes=[webp]",)
    ),
    "model.backbone.burgess.kind": Change(BURGESS[:1], weights, BURGESS[1:]),
    "model.backbone.mlp.kind": Change(("model.backbone={kind: mlp}",), weights, BURGESS),
    "model.backbone.mlp.hidden": Change(("model.backbone.hidden=[7]",)),
    "model.backbone.locatello.kind": Change(
        ("model.backbone={kind: locatello}",),
        weights,
        ("model.backbone={kind: mlp}", "data.decode.size=64"),
    ),
    "model.backbone.tiny.kind": Change((TINY,), weights, RESNET[1:]),
    "model.backbone.resnet.kind": Change(RESNET[:1], weights, (TINY, RESNET[1])),
    "model.backbone.resnet.preset": Change(
        ("model.backbone.preset=resnet-mini",),
        weights,
        ("model.backbone={kind: resnet, preset: resnet-xs, groups: 8}", RESNET[1]),
    ),
    **resnet("widths", "model.backbone.widths=[8, 8]"),
    **resnet("decoder_widths", "model.backbone.decoder_widths=[8, 8]"),
    **resnet("blocks", "model.backbone.blocks=2"),
    **resnet("groups", "model.backbone.groups=2"),
    **resnet("quant_convs", "model.backbone.quant_convs=false"),
    **resnet("pixel_range", "model.backbone.pixel_range=[0, 1]"),
    **resnet("attention.levels", "model.backbone.attention.levels=[1]"),
    **resnet("attention.decoder_levels", "model.backbone.attention.decoder_levels=[1]"),
    **resnet("attention.mid", "model.backbone.attention.mid=false"),
    "model.bottleneck.deterministic.kind": Change(
        ("model.bottleneck.kind=deterministic",), given=("objective.regularisers=[]",)
    ),
    "model.bottleneck.deterministic.size": Change(
        ("model.bottleneck.size=3",),
        given=("objective.regularisers=[]", "model.bottleneck.kind=deterministic"),
    ),
    "model.bottleneck.gaussian.kind": Change(
        ("model.bottleneck.kind=gaussian",),
        given=("objective.regularisers=[]", "model.bottleneck.kind=deterministic"),
    ),
    "model.bottleneck.gaussian.size": Change(("model.bottleneck.size=3",)),
    "model.bottleneck.gaussian.logvar": Change(("model.bottleneck.logvar=clamp",)),
    "model.gradient_checkpointing": Change(
        ("model.gradient_checkpointing=true",), kept_activations
    ),
    "model.likelihood.squared_error.kind": Change((SQUARED,)),
    "model.likelihood.squared_error.link": Change(
        ("model.likelihood.link=sigmoid",), given=(SQUARED,)
    ),
    "model.likelihood.gaussian.kind": Change(
        ("model.likelihood={kind: gaussian}",), given=(SQUARED,)
    ),
    "model.likelihood.gaussian.sigma": Change(("model.likelihood.sigma=0.5",)),
    "model.likelihood.gaussian.link": Change(("model.likelihood.link=sigmoid",)),
    "model.likelihood.bernoulli.kind": Change(("model.likelihood={kind: bernoulli}",)),
    "corruptions": Change(
        ("corruptions=[{kind: gaussian_noise}, {kind: masking}]",),
        given=("corruptions=[{kind: masking}, {kind: gaussian_noise}]",),
    ),
    **corruption("gaussian_noise", sigma="0.3"),
    **corruption("masking", fraction="0.5"),
    **corruption("salt_and_pepper", fraction="[0.2, 0.4]"),
    **corruption("patch_mask", patch_size="2", fraction="0.25", fill="1.0"),
    "init_from": Change(("init_from={base}",), started),
    "freeze": Change(("freeze=[encoder.*]",)),
    "objective.emphasis.corrupted": Change(("objective.emphasis.corrupted=2.0",), given=(MASKED,)),
    "objective.emphasis.untouched": Change(("objective.emphasis.untouched=0.5",), given=(MASKED,)),
    "objective.regularisers": Change(("objective.regularisers=[]",)),
    "objective.regularisers.kl.kind": Change(
        ("objective.regularisers=[{kind: kl}]",), given=("objective.regularisers=[]",)
    ),
    "objective.regularisers.kl.weight": Change(("objective.regularisers.0.weight=4.0",)),
    "objective.regularisers.kl.weight.linear.kind": Change((SCHEDULE,)),
    "objective.regularisers.kl.weight.linear.start": Change(
        ("objective.regularisers.0.weight.start=0.5",), given=(SCHEDULE,)
    ),
    "objective.regularisers.kl.weight.linear.end": Change(
        ("objective.regularisers.0.weight.end=2.0",), given=(SCHEDULE,)
    ),
    "objective.regularisers.kl.weight.linear.over_samples": Change(
        ("objective.regularisers.0.weight.over_samples=8",), given=(SCHEDULE,)
    ),
    f"{RATE}.peak": Change((f"{RATE}.peak=0.01",)),
    f"{RATE}.final": Change((f"{RATE}.final=0.0005",)),
    f"{RATE}.warmup_samples": Change((f"{RATE}.warmup_samples=16",)),
    "optimizer.beta1": Change(("optimizer.beta1=0.5",)),
    "optimizer.beta2": Change(("optimizer.beta2=0.5",)),
    "optimizer.epsilon": Change(("optimizer.epsilon=0.1",)),
    "optimizer.weight_decay": Change(("optimizer.weight_decay=0.5",)),
    "optimizer.max_grad_norm": Change(("optimizer.max_grad_norm=0.0001",)),
    "batch_size": Change(("batch_size=16",)),
    "accumulation": Change(("accumulation=4",), weights),
    "num_steps": Change(("num_steps=3",), checkpoints),
    "seed": Change(("seed=1",)),
    "precision": Change(("precision=bf16",)),
    "ema_decay": Change(("ema_decay=0.1",), average),
    "channels_last": Change(("channels_last=false",), memory_format, BURGESS),
    "compile": Change(("compile=true",), compiled),
    "max_skipped_steps": Change(("max_skipped_steps=0",), ending, (f"{RATE}.peak=1e30",)),
    "evaluation.data.path": Change(("evaluation.data={path: {tmp}/other}",), evaluation),
    "evaluation.data.shards": Change(
        ("evaluation.data.shards={tmp}/shards",), ending, ("evaluation.data={path: {tmp}/apart}",)
    ),
    "evaluation.data.split": Change(
        ("evaluation.data.split=other",), evaluation, ("evaluation.data={path: {tmp}/shards}",)
    ),
    "evaluation.max_samples": Change(("evaluation.max_samples=3",), evaluation),
    "evaluation.split": Change(("evaluation.split=other",), evaluation),
    "evaluation.every_steps": Change(("evaluation.every_steps=3",), evaluated_steps),
    "evaluation.metrics": Change(("evaluation.metrics=[]",), evaluation),
    **{
        f"evaluation.metrics.{kind}.kind": Change(
            (f"evaluation.metrics=[{{kind: {kind}}}]",), evaluation, ("evaluation.metrics=[]",)
        )
        for kind in (
            "squared_error",
            "log_likelihood",
            "psnr",
            "active_units",
            "kl_per_dimension",
        )
    },
    "evaluation.metrics.ssim.kind": Change(
        ("evaluation.metrics=[{kind: ssim}]",),
        evaluation,
        ("evaluation.metrics=[]", "data.decode.size=12"),
    ),
    **{
        f"evaluation.metrics.{kind}.decodes": Change(
            (f"evaluation.metrics=[{{kind: {kind}, decodes: sample}}]",),
            evaluation,
            (f"evaluation.metrics=[{{kind: {kind}}}]", "data.decode.size=12"),
        )
        for kind in ("psnr", "ssim")
    },
    **{path: Change(*row) for path, row in network_changes().items()},
    "checkpoint.every_steps": Change(("checkpoint.every_steps=2",), checkpoints),
    "checkpoint.keep.latest": Change(
        ("checkpoint.keep.latest=3",), checkpoints, ("checkpoint.every_steps=1",)
    ),
    "checkpoint.keep.every_samples": Change(
        ("checkpoint.keep.every_samples=8",), checkpoints, ("checkpoint.every_steps=1",)
    ),
    "checkpoint.keep.best.metric": Change(
        ("checkpoint.keep.best.metric=eval/samples",),
        best,
        ("checkpoint.keep.best.metric=eval/loss",),
    ),
    "checkpoint.keep.best.mode": Change(
        ("checkpoint.keep.best.mode=max",), best, ("checkpoint.keep.best.metric=eval/loss",)
    ),
    "evaluation.patience": Change(
        ("evaluation.patience=1",),
        ended_at,
        ("checkpoint.keep.best={metric: eval/samples}", "evaluation.every_steps=1"),
    ),
    "watchdog.seconds": Change(("watchdog.seconds=null",), watches),
    "monitor.log_every_steps": Change(("monitor.log_every_steps=2",), logged_steps),
    "monitor.num_images": Change(("monitor.num_images=3",), picture_sizes),
    "monitor.pictured": Change(("monitor.pictured=['0024']",), shown),
    "monitor.rows_by": Change(
        ("monitor.rows_by=ssim",),
        shown,
        ("evaluation.metrics=[{kind: squared_error}, {kind: ssim}]", "data.decode.size=12"),
    ),
    "monitor.wandb.mode": Change((OFFLINE,), wandb_run),
    "monitor.wandb.project": Change(("monitor.wandb.project=p",), wandb_run, (OFFLINE,)),
    "monitor.wandb.name": Change(("monitor.wandb.name=n",), wandb_run, (OFFLINE,)),
    "monitor.wandb.group": Change(("monitor.wandb.group=g",), wandb_run, (OFFLINE,)),
    "monitor.wandb.tags": Change(("monitor.wandb.tags=[t]",), wandb_run, (OFFLINE,)),
}


# Settings that cannot change a run yet.
WITHOUT_EFFECT = (
    "latent_transforms",  # there is no kind of them
    # The former defaults are those of W&B, which changes no number, and of evaluations of more
    # samples than these.
    "version",
)


def test_the_table_names_every_setting_and_nothing_else():
    assert sorted([*CHANGES, *WITHOUT_EFFECT]) == sorted(leaves(TrainConfig))
    assert list(FORMER_DEFAULTS) == [2, 3]
    assert TrainConfig.model_fields["latent_transforms"].annotation == tuple[()]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # of torch's own compiler
@pytest.mark.parametrize("path", CHANGES)
def test_changing_a_setting_changes_the_run(path: str, world: World):
    change = CHANGES[path]
    before, after = change.given, (*change.given, *change.changed)
    assert change.seen(world, before) != change.seen(world, after)


def test_a_run_without_a_change_looks_the_same(world: World, tmp_path: Path):
    """Without this, a run that drew from the clock would pass all the tests above."""
    again = World(world.shards, tmp_path)
    for seen in (losses, weights, average, evaluation, checkpoints, picture_sizes):
        assert seen(world, ()) == seen(again, ())
        assert seen(world, ())


def test_what_may_change_on_a_resume_exists():
    names = list(leaves(TrainConfig))
    for name in MAY_CHANGE:
        assert any(path == name or path.startswith(f"{name}.") for path in names), name
