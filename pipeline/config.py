"""The config of a training run: one frozen tree, checked as a whole before anything starts.

`strict` reads it from YAML; `configs/train/` has examples. Each component's settings are defined in
the component's file. This file has the settings of the run, and rules about several parts.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, Field, model_validator

from pipeline.checkpoints.retention import CheckpointConfig
from pipeline.common import strict
from pipeline.common.component import Component, LocalDirectory, LocalPath
from pipeline.common.precision import Precision
from pipeline.common.shipped import find
from pipeline.common.trial import with_trial
from pipeline.corruptions import Corruption
from pipeline.corruptions.latents import LatentTransforms
from pipeline.data.order import default_lanes
from pipeline.data.settings import DataConfig
from pipeline.distributed.optimizer import AdamWConfig
from pipeline.distributed.watchdog import WatchdogConfig
from pipeline.losses.objective import Objective
from pipeline.losses.players import Player
from pipeline.losses.terms import AdversarialTerm
from pipeline.metrics import ranking_of
from pipeline.metrics.settings import EvaluationConfig, evaluation_before_version_3
from pipeline.models.autoencoder import ModelConfig
from pipeline.monitoring.monitor import MonitorConfig
from pipeline.monitoring.wandb_mode import wandb_before_version_2

# Version of the defaults below. Raised when a default changes: a key that is missing in an old file
# keeps its old meaning. Version 1 is commit 93dd2d6, whose files have no `version`.
VERSION = 3
# For each version that changed defaults: a function that fills the former defaults into a file's
# tree, where keys are missing; see `strict.set_default`.
FormerDefaults = Mapping[int, Callable[[dict[str, Any]], None]]
FORMER_DEFAULTS: FormerDefaults = {2: wandb_before_version_2, 3: evaluation_before_version_3}

# Settings that a resumed run may change: they change no number that the run computes, or are meant
# to be extended. The name of a section stands for everything in it.
MAY_CHANGE = (
    "run_dir",
    "num_steps",
    "accumulation",
    "model.gradient_checkpointing",
    "monitor",
    "checkpoint",
    "watchdog",
    "evaluation.every_steps",
    "evaluation.patience",
    "data.threads",
    "data.remote",
)


class TrainConfig(Component):
    """A training run."""

    version: int = Field(default=VERSION, ge=1, le=VERSION)  # version of the defaults; see VERSION
    # where the run writes everything; no URL; {trial} stands for the id of a trial of a W&B sweep
    run_dir: Annotated[LocalDirectory, AfterValidator(with_trial)]
    data: DataConfig
    model: ModelConfig = ModelConfig()
    corruptions: tuple[Corruption, ...] = ()  # in this order; the target stays clean
    latent_transforms: LatentTransforms = ()  # in this order, before the decoder
    # The weights of a new run, read at its first start only: a run directory (its newest
    # checkpoint, averaged weights if it has some), a model's folder (of export-model, import-model
    # or diffusers), or a .safetensors file. null: random weights.
    init_from: LocalPath | None = None
    # Patterns of parameters that are not trained, by their names in a checkpoint: [encoder.*].
    freeze: tuple[str, ...] = ()
    objective: Objective = Objective()
    optimizer: AdamWConfig = AdamWConfig()
    # The global batch G: samples per step, over all processes.
    batch_size: int = Field(default=256, gt=0)
    accumulation: int = Field(default=1, gt=0)  # micro-batches per step and process
    num_steps: int = Field(default=10_000, gt=0)  # length of the run; a higher one lengthens it
    seed: int = Field(default=0, ge=0)  # weights, order, corruption and noise follow from it
    precision: Precision = "fp32"  # bf16: autocast, losses in fp32; fp64: for proofs
    ema_decay: float | None = Field(default=0.999, gt=0, lt=1)  # null: no average
    # Memory format of images, changes the speed alone; null: the backbone's own.
    channels_last: bool | None = None
    compile: bool = False  # torch.compile for encoder and decoder, each by itself
    max_skipped_steps: int = Field(default=20, ge=0)  # steps with a gradient that is not finite
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    monitor: MonitorConfig = MonitorConfig()
    watchdog: WatchdogConfig = WatchdogConfig()

    @classmethod
    def load(cls, path: str | Path, *overrides: str) -> "TrainConfig":
        """Read a YAML file, or shipped settings by name, and override them by `a.b=c`.

        Raises UserError with all problems.
        """
        return read_config(find("train", path), overrides)

    @property
    def total_samples(self) -> int:
        """Samples that the whole run consumes."""
        return self.num_steps * self.batch_size

    @property
    def depends_on_processes(self) -> bool:
        """Whether the loss depends on how a global batch is cut into micro-batches."""
        return any(term.scope == "micro_batch" for term in self.objective.regularisers)

    @property
    def may_change(self) -> tuple[str, ...]:
        """Settings that a resumed run may change."""
        fixed = ("accumulation",) if self.depends_on_processes else ()
        return tuple(name for name in MAY_CHANGE if name not in fixed)

    def learning_rate_at(self, samples: int) -> float:
        """Learning rate of the update that follows `samples` seen samples."""
        return self.optimizer.learning_rate.at(samples, total_samples=self.total_samples)

    def learning_rates_at(self, samples: int) -> dict[Player, float]:
        """Learning rates of the players; 0 for a player that is not trained: no weight decay."""
        rates: dict[Player, float] = {"autoencoder": self.learning_rate_at(samples)}
        if (term := self.objective.adversarial) is not None:
            plays = term.discriminator_weight_at(samples) > 0
            rates["discriminator"] = plays * term.discriminator.rate * rates["autoencoder"]
        return rates

    def schedule_values(self, samples: int) -> dict[str, float]:
        """Return the values of all schedules, by metric name."""
        weights = self.objective.weights_at(samples)
        return {
            "optim/learning_rate": self.learning_rate_at(samples),
            **{f"optim/weight_{name}": weight for name, weight in weights.items()},
        }

    def resolved(self) -> Self:
        """Return the config with derived settings filled in."""
        lanes = self.data.lanes or default_lanes(self.batch_size)
        data = self.data.model_copy(update={"lanes": lanes})
        own, channels_last = self.model.backbone.channels_last, self.channels_last
        channels_last = own if channels_last is None else channels_last
        return self.model_copy(update={"data": data, "channels_last": channels_last})

    def evaluates_at(self, step: int) -> bool:
        """Whether the held-out evaluation belongs to this step."""
        return step % self.evaluation.every_steps == 0 or step >= self.num_steps

    def is_over(self, step: int, evaluations_since_best: int) -> bool:
        """Whether the run ends at this step: by num_steps or by early stopping."""
        patience = self.evaluation.patience
        stops_early = patience is not None and evaluations_since_best >= patience
        return step >= self.num_steps or stops_early

    @model_validator(mode="after")
    def _shapes_fit(self) -> Self:
        event_shape = self.data.decode.event_shape
        self.model.backbone.check_event(event_shape)
        for corruption in self.corruptions:
            corruption.check_event(event_shape)
        return self

    @model_validator(mode="after")
    def _objective_is_defined(self) -> Self:
        kinds = [term.kind for term in self.objective.regularisers]
        for term in self.objective.regularisers:
            bottleneck = self.model.bottleneck
            if term.needs_density and not bottleneck.has_density:
                raise ValueError(
                    f"regulariser {term.kind} needs a density, but model.bottleneck.kind is "
                    f"{bottleneck.kind}: take bottleneck gaussian, or leave the regulariser out"
                )
            if term.scope == "global_batch" and self.accumulation > 1:
                raise ValueError(
                    f"regulariser {term.kind} depends on the whole global batch, but accumulation "
                    f"{self.accumulation} computes it in parts: set accumulation to 1 and take "
                    "more processes"
                )
        if len(set(kinds)) < len(kinds):
            raise ValueError(f"objective.regularisers names a kind twice: {', '.join(kinds)}")
        if sum(isinstance(term, AdversarialTerm) for term in self.objective.regularisers) > 1:
            raise ValueError("objective.regularisers names two adversarial terms: one may play")
        return self

    @model_validator(mode="after")
    def _emphasis_is_defined(self) -> Self:
        if self.objective.emphasis.is_neutral:
            return self
        masks = any(corruption.has_mask for corruption in self.corruptions)
        if not masks:
            raise ValueError(
                "objective.emphasis weighs corrupted elements, but no corruption marks any: add "
                "masking, salt_and_pepper or patch_mask, or leave emphasis out"
            )
        if self.latent_transforms:
            raise ValueError(
                "objective.emphasis weighs corrupted elements, but latent_transforms move them: "
                "leave one of the two out"
            )
        return self

    @model_validator(mode="after")
    def _metrics_are_defined(self) -> Self:
        self.evaluation.check_metrics(self.model, self.data.decode)
        ranking_of(self.evaluation.metrics, self.monitor.rows_by)
        return self

    @model_validator(mode="after")
    def _best_is_defined(self) -> Self:
        best = self.checkpoint.keep.best
        if best is None and self.evaluation.patience is not None:
            raise ValueError(
                f"evaluation.patience {self.evaluation.patience} needs a metric to be patient "
                "with: set checkpoint.keep.best, for example to {metric: eval/loss, mode: min}"
            )
        if best is not None:
            self.evaluation.check_name(best.metric, "checkpoint.keep.best.metric")
        if best is not None and best.metric.startswith("eval_ema/") and self.ema_decay is None:
            raise ValueError(
                f"checkpoint.keep.best.metric {best.metric} needs averaged weights, but ema_decay "
                "is null"
            )
        return self

    @model_validator(mode="after")
    def _batch_divides(self) -> Self:
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"accumulation {self.accumulation} does not divide batch_size {self.batch_size}"
            )
        if self.data.lanes is not None and self.batch_size % self.data.lanes:
            raise ValueError(
                f"data.lanes {self.data.lanes} does not divide batch_size {self.batch_size}"
            )
        return self

    @model_validator(mode="after")
    def _learning_rate_fits(self) -> Self:
        rate = self.optimizer.learning_rate
        if rate.final > rate.peak:
            raise ValueError(
                f"optimizer.learning_rate.final {rate.final} is above its peak {rate.peak}"
            )
        if rate.warmup_samples > self.total_samples:
            raise ValueError(
                f"optimizer.learning_rate.warmup_samples {rate.warmup_samples} is more than the "
                f"run's num_steps * batch_size = {self.total_samples} samples: lower it, or train "
                "for longer"
            )
        return self


def read_config(
    path: Path | None, overrides: Sequence[str] = (), *, version: int | None = None
) -> TrainConfig:
    """Read a config; see `strict.load`.

    version: version of a file without `version`. None: that of the run in its run_dir, so that the
    same command resumes after an update; without such a run the newest.
    """

    def read(version: int) -> TrainConfig:
        fill_in = partial(fill_in_defaults, version=version)
        return strict.load(TrainConfig, path, overrides, fill_in=fill_in)

    if version is not None:
        return read(version)
    config = read(VERSION)
    former = Path(config.run_dir) / "config.yaml"
    if not former.is_file():
        return config
    tree, _ = strict.parse(former.read_text(encoding="utf-8"))
    found = tree.get("version", 1) if isinstance(tree, dict) else None
    return read(found) if isinstance(found, int) and found < VERSION else config


def fill_in_defaults(
    tree: dict[str, Any], version: int, former_defaults: FormerDefaults = FORMER_DEFAULTS
) -> None:
    """Fill in the defaults of the version that wrote the file."""
    written_by = tree.setdefault("version", version)
    for changed_in in sorted(former_defaults):
        if isinstance(written_by, int) and written_by < changed_in:
            former_defaults[changed_in](tree)
