"""What a config allows and nobody means: for `latentmill doctor` and for a dry run.

config, and the indexes where they can be read -> (what is looked at, value, bound, setting, remedy)
"""

import math
from collections.abc import Iterator, Sequence

from pipeline.config import TrainConfig
from pipeline.data.index import Index
from pipeline.data.index.splits import is_pattern
from pipeline.data.pack.parts import few_shards
from pipeline.training.build import build_without_memory

# The standard error of a mean over 100 samples is a tenth of their standard deviation.
MIN_HELD_OUT = 100
MAX_PERCENT = 20  # of a data set that is held out at most
# More than the longest trainings that are published for such models (masked autoencoders on
# ImageNet: 1,600 epochs, He et al. 2022); for pictures without augmentation a few hundred suffice.
MAX_EPOCHS = 2000
ADVISED_EPOCHS = 200

Advice = tuple[str, str]  # what is looked at, and the text


def doubts(config: TrainConfig, indexes: Sequence[Index], processes: int = 1) -> Iterator[Advice]:
    """Yield what is likely to be a mistake; indexes: of all data sets, or none if unreadable."""
    yield from _rate(config)
    if not indexes:
        return
    yield from _held_out(config, indexes)
    num_samples = [int(index.counts(config.data.split).sum()) for index in indexes]
    if len(indexes) == 1:  # what an epoch of a mixture is nobody can say
        yield from _length(config, num_samples[0])
    if config.batch_size > sum(num_samples) > 0:
        yield (
            "batch",
            f"batch_size {config.batch_size:,} is above the {sum(num_samples):,} samples of "
            f"data.split {config.data.split}: every step sees some of them again; set batch_size "
            f"to at most {sum(num_samples):,}",
        )
    for index in indexes:
        few = few_shards(len(index.shards), index.num_samples, processes)
        if few:
            yield "shards", f"{index.path}: {few}"


def _rate(config: TrainConfig) -> Iterator[Advice]:
    """A posterior with a variance that nothing in the objective sees."""
    if not config.model.bottleneck.has_density:
        return
    terms = [term for term in config.objective.regularisers if term.needs_density]
    if any(term.weight_at(at) > 0 for term in terms for at in (0, config.total_samples)):
        return
    encoder = build_without_memory(config).encoder
    if not any(parameter.requires_grad for parameter in encoder.parameters()):
        return  # a frozen variance cannot shrink
    kinds = ", ".join(f"{term.kind} of weight 0" for term in terms) or "no term for it"
    yield (
        "objective",
        "model.bottleneck gaussian draws z from the encoder's variance, but objective.regularisers "
        f"holds {kinds}: nothing keeps the variance from shrinking to 0, so this is no VAE; set "
        "objective.regularisers to [{kind: kl}], or model.bottleneck.kind to deterministic",
    )


def _held_out(config: TrainConfig, indexes: Sequence[Index]) -> Iterator[Advice]:
    split = config.evaluation.split
    if config.evaluation.own:
        return
    count = sum(int(index.counts(split).sum()) for index in indexes)
    total = sum(index.num_samples for index in indexes)
    if 0 < count < MIN_HELD_OUT:
        percent = math.ceil(120 * MIN_HELD_OUT / total)  # a fifth more: it is drawn
        rule = f"{{train: {1 - percent / 100:.2f}, {split}: {percent / 100:.2f}}}"
        remedy = (
            f"hold out more by `latentmill index {indexes[0].path} --split '{{fractions: {rule}}}'`"
        )
        if percent > MAX_PERCENT or is_pattern(split):
            remedy = "more samples would mend that"
        yield (
            "split",
            f"evaluation.split {split} holds {count:,} of {total:,} samples, fewer than "
            f"{MIN_HELD_OUT}: its means are rough; {remedy}",
        )


def _length(config: TrainConfig, num_samples: int) -> Iterator[Advice]:
    if num_samples and config.total_samples > MAX_EPOCHS * num_samples:
        epochs = config.total_samples / num_samples
        advised = max(ADVISED_EPOCHS * num_samples // config.batch_size, 1)
        yield (
            "length",
            f"num_steps {config.num_steps:,} of batch_size {config.batch_size:,} are {epochs:,.0f} "
            f"epochs of {num_samples:,} samples, more than {MAX_EPOCHS:,}; {ADVISED_EPOCHS} epochs "
            f"are num_steps={advised:,}; evaluation.patience ends a run that gets no better",
        )
