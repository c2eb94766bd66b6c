"""The config of a training run: one frozen tree, checked as a whole before anything starts.

`strict` reads it from YAML; `configs/train/` has examples. A component's own settings stand in the
component's file; here stand the run's, and the rules that join several parts.
"""

from typing import Self

from pydantic import Field, model_validator

from pipeline.checkpoints.retention import CheckpointConfig
from pipeline.common.component import Component
from pipeline.common.precision import Precision
from pipeline.corruptions import Corruption
from pipeline.data.settings import DataConfig
from pipeline.distributed.optimizer import AdamWConfig
from pipeline.distributed.watchdog import WatchdogConfig
from pipeline.losses.objective import Objective
from pipeline.models.autoencoder import ModelConfig
from pipeline.monitoring.monitor import MonitorConfig

# What may differ when a run goes on, because it changes no number that the run computes, or is
# meant to be extended. Names of whole sections cover what is in them.
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


class EvaluationConfig(Component):
    """Held-out evaluation during the run; also at its start and end."""

    split: str = "held_out"
    every_steps: int = Field(default=1000, gt=0)
    # End the run after so many evaluations in a row that were not better than the best one, by
    # checkpoint.keep.best; null: never.
    patience: int | None = Field(default=None, gt=0)


class TrainConfig(Component):
    """A training run."""

    run_dir: str  # everything that the run writes
    data: DataConfig
    model: ModelConfig = ModelConfig()
    corruptions: tuple[Corruption, ...] = ()  # in this order; the target stays clean
    objective: Objective = Objective()
    optimizer: AdamWConfig = AdamWConfig()
    batch_size: int = Field(
        default=256, gt=0
    )  # the global batch G: samples per step over all processes
    accumulation: int = Field(default=1, gt=0)  # micro-batches per step and process
    num_steps: int = Field(default=10_000, gt=0)
    seed: int = Field(default=0, ge=0)  # weights, order, corruption and noise follow from it
    precision: Precision = "fp32"
    ema_decay: float | None = Field(default=0.999, gt=0, lt=1)  # null: no average
    channels_last: bool = True
    compile: bool = False
    max_skipped_steps: int = Field(default=20, ge=0)  # steps with a gradient that is not finite
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    monitor: MonitorConfig = MonitorConfig()
    watchdog: WatchdogConfig = WatchdogConfig()

    @property
    def total_samples(self) -> int:
        """Samples that the whole run consumes."""
        return self.num_steps * self.batch_size

    def learning_rate_at(self, samples: int) -> float:
        """Learning rate of the update that follows `samples` seen samples."""
        return self.optimizer.learning_rate.at(samples, total_samples=self.total_samples)

    def schedule_values(self, samples: int) -> dict[str, float]:
        """Return the values of all schedules, by metric name."""
        values = {"optim/learning_rate": self.learning_rate_at(samples)}
        for term, weight in zip(
            self.objective.regularisers, self.objective.weights_at(samples), strict=True
        ):
            values[f"optim/weight_{term.kind}"] = weight
        return values

    def evaluates_at(self, step: int) -> bool:
        """Whether the held-out evaluation belongs to this step."""
        return step % self.evaluation.every_steps == 0 or step >= self.num_steps

    def is_over(self, step: int, evaluations_since_best: int) -> bool:
        """Whether the run ends at this step: it has its length, or no longer gets better."""
        patience = self.evaluation.patience
        gives_up = patience is not None and evaluations_since_best >= patience
        return step >= self.num_steps or gives_up

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
            if term.needs_random_posterior and self.model.bottleneck.kind == "deterministic":
                raise ValueError(
                    f"regulariser {term.kind} needs a density, but model.bottleneck.kind is "
                    "deterministic: take bottleneck gaussian, or leave the regulariser out"
                )
        if len(set(kinds)) < len(kinds):
            raise ValueError(f"objective.regularisers names a kind twice: {', '.join(kinds)}")
        masks = any(corruption.has_mask for corruption in self.corruptions)
        if not self.objective.emphasis.is_neutral and not masks:
            raise ValueError(
                "objective.emphasis weighs corrupted elements, but no corruption marks any: add "
                "masking, salt_and_pepper or patch_mask, or leave emphasis out"
            )
        return self

    @model_validator(mode="after")
    def _best_is_defined(self) -> Self:
        best = self.checkpoint.keep.best
        if best is None and self.evaluation.patience is not None:
            raise ValueError(
                f"evaluation.patience {self.evaluation.patience} needs a metric to be patient "
                "with: set checkpoint.keep.best, for example to {metric: eval/loss, mode: min}"
            )
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
