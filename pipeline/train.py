"""Training, as `latentmill train CONFIG [a.b=c ...]` starts it; the same command resumes.

`train` is the whole run, top to bottom. One step consumes a global batch: every process takes its
slots of it, in `accumulation` micro-batches.
"""

import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

from pipeline.common import needs

if __name__ == "__main__":
    needs.check()  # before anything of the extra is imported

from pipeline.checkpoints.manager import Checkpoints
from pipeline.common.arguments import parse_train
from pipeline.common.errors import DONE, FAILED, PREEMPTED, WRONG_USE, UserError
from pipeline.config import TrainConfig, read_config
from pipeline.data.order.mixture import reading_plan
from pipeline.data.stream import Stream, open_stream
from pipeline.data.stream.datasets import open_indexes
from pipeline.data.stream.device import DeviceBatches
from pipeline.distributed.outcome import Outcome, write_outcome
from pipeline.distributed.rendezvous import print_error
from pipeline.distributed.runtime import Runtime, Stopped, StopRequest
from pipeline.distributed.strategies.base import Strategy
from pipeline.distributed.watchdog import Watchdog
from pipeline.evaluation.held_out import HeldOut, held_out_splits, views_of
from pipeline.monitoring.bad_samples import Quarantine
from pipeline.monitoring.ledger import Ledger
from pipeline.monitoring.meter import TrainingMeter
from pipeline.monitoring.monitor import Monitor
from pipeline.training.build import (
    check_data,
    describe,
    make_forward,
    make_order,
    make_strategy,
    warm_up_loss,
)
from pipeline.training.forward import Forward
from pipeline.training.run_directory import check_ranks, locked_run_dir
from pipeline.training.step import check_skipped, train_step


def train(config: TrainConfig, *, accept_changes: Sequence[str] = ()) -> int:
    """Run or resume a training and return its exit code; every process calls it.

    Raises UserError, before anything is written, if the processes, the data, the batch or the run
    directory do not fit.
    """
    config = config.resolved()
    # Join the processes, check the data, lock the run directory.
    runtime = Runtime.start(
        accumulation=config.accumulation, timeout_seconds=config.watchdog.collective_timeout
    )
    run_dir = Path(config.run_dir)
    with ExitStack() as stack:
        stop = stack.enter_context(closing(StopRequest(run_dir)))
        with runtime.sharing_errors():
            check_ranks(config, runtime)
            indexes = open_indexes(config.data)
            states = check_data(config, indexes)
        order = make_order(config, indexes)
        failures = stack.enter_context(locked_run_dir(config, accept_changes, order, runtime))
        watchdog = stack.enter_context(closing(Watchdog(config.watchdog, failures, runtime)))

        # Build the model, warm up, restore the newest checkpoint.
        forward = make_forward(config, runtime.device)
        strategy = make_strategy(config, runtime)
        with watchdog.phase("start", 0):
            strategy.warm_up(warm_up_loss(config, forward, strategy, runtime))
        checkpoints = Checkpoints(
            run_dir / "checkpoints",
            config.checkpoint,
            strategy=strategy,
            order=order,
            runtime=runtime,
        )
        stack.enter_context(closing(checkpoints))
        with watchdog.phase("start", 0):
            step = first_step = checkpoints.restore()

        # What the loop reads from and reports to.
        stream = stack.enter_context(
            open_stream(
                config.data,
                indexes,
                order,
                states,
                first_step=first_step,
                num_steps=max(config.num_steps - first_step, 0),
                rank=runtime.rank,
                world=runtime.world,
                device=runtime.device,
            )
        )
        monitor = stack.enter_context(
            Monitor(
                run_dir,
                config.monitor,
                resolved=config.model_dump(mode="json"),
                step=first_step,
                num_steps=config.num_steps,
                evaluates=config.evaluates_at(first_step),
                is_main=runtime.is_main,
            )
        )
        checkpoints.load_evaluations(monitor.past)
        quarantine = Quarantine(run_dir, config.data, runtime)
        splits = held_out_splits(config, indexes, states)
        ledger = Ledger(
            stream,
            indexes,
            split=config.data.split,
            prefetch=config.data.prefetch,
            runtime=runtime,
        )
        trainer = Trainer(
            config=config,
            runtime=runtime,
            watchdog=watchdog,
            stop=stop,
            forward=forward,
            strategy=strategy,
            stream=stream,
            checkpoints=checkpoints,
            monitor=monitor,
            ledger=ledger,
            quarantine=quarantine,
            held_out=HeldOut(config, splits, forward, runtime, quarantine),
        )

        # Record a failure before anything is closed, which may take minutes, and stop the watchdog.
        stack.enter_context(closing(watchdog))
        stack.enter_context(failures.recorded())
        stopped_by: str | None = None
        try:
            if runtime.broadcast(monitor.lacks_evaluation):
                trainer.evaluate(step)
            last = config.is_over(step, checkpoints.evaluations_since_best)
            if not last:
                monitor.print_line(f"{runtime.hardware}; {reading_plan(order, runtime.world)}")
            while not last:
                step += 1
                trainer.update(step)

                # Evaluate before saving, so that the checkpoint of a new best value is kept.
                last, is_best = step >= config.num_steps, False
                if not last:
                    stop.check(runtime)
                if config.evaluates_at(step):
                    ledger.check_against_plan()
                    is_best = trainer.evaluate(step)
                    last = config.is_over(step, checkpoints.evaluations_since_best)
                if last or step % config.monitor.log_every_steps == 0:
                    trainer.log(step)
                if last or is_best or step % config.checkpoint.every_steps == 0:
                    trainer.save(step)
        except Stopped as reason:
            stopped_by = str(reason)
            if step > first_step:
                trainer.log(step)
                trainer.save(step)
        return trainer.finish(step, stopped_by)


@dataclass
class Trainer:
    """What a running training does at a step. Every process has one; all call its methods together.

    Each method names its phase to the watchdog. Step 1 is the first update.
    """

    config: TrainConfig
    runtime: Runtime
    watchdog: Watchdog
    stop: StopRequest
    forward: Forward
    strategy: Strategy
    stream: Stream
    checkpoints: Checkpoints
    monitor: Monitor
    ledger: Ledger
    quarantine: Quarantine
    held_out: HeldOut
    kept: object = None  # the last micro-batch's tensors: see `train_step`

    def __post_init__(self) -> None:
        self.batches = DeviceBatches(self.stream, self.runtime.device)
        self.meter = TrainingMeter(self.runtime, self.stream)
        self.views = views_of(self.strategy, self.config)

    def update(self, step: int) -> None:
        """Take the next global batch and update the weights: the update that `step` counts."""
        self.watchdog.enter("data", step)
        batch = next(self.batches)
        self.watchdog.enter("update", step)
        samples = (step - 1) * self.config.batch_size
        self.kept = train_step(batch, samples, self.config, self.forward, self.strategy, self.meter)

    def evaluate(self, step: int) -> bool:
        """Evaluate the weights of `step`; return whether they are the best so far."""

        def before_batch() -> None:
            self.watchdog.enter("evaluation", step)
            self.stop.check(self.runtime)

        with self.meter.paused():
            metrics = self.held_out.evaluate(
                self.views, step, monitor=self.monitor, before_batch=before_batch
            )
        return self.checkpoints.add_evaluation(metrics, step)

    def log(self, step: int) -> None:
        """Log what happened since the last log."""
        self.watchdog.enter("log", step)
        config, samples = self.config, step * self.config.batch_size
        values = self.meter.read() | config.schedule_values(samples - config.batch_size)
        values |= {"data/samples_seen": samples}
        values |= {"data/epoch": samples / self.stream.order.num_samples}
        values |= self.quarantine.collect(self.stream) | self.ledger.read()
        values |= self.checkpoints.read()
        self.monitor.log(step, values)
        self.monitor.progress(step, values)
        check_skipped(values["optim/skipped_steps"], config)

    def save(self, step: int) -> None:
        """Save a checkpoint."""
        self.watchdog.enter("checkpoint", step)
        with self.meter.paused():
            self.checkpoints.save(step)

    def finish(self, step: int, stopped_by: str | None) -> int:
        """Wait for the last checkpoint, record how the run ended and return the exit code."""
        self.watchdog.enter("end", step)
        saved = self.checkpoints.finish()
        outcome = outcome_of(self.config, step, stopped_by, saved, self.checkpoints.best_step)
        if self.runtime.is_main:
            write_outcome(Path(self.config.run_dir), outcome)
        then = outcome.message
        if stopped_by is not None:
            then += "; the same command resumes"
        self.monitor.print_line(
            f"{outcome.status} at step {step:,}" + (f": {then}" if then else "")
        )
        self.watchdog.close()  # W&B may upload for longer than the watchdog allows
        return outcome.exit_code or DONE


def outcome_of(
    config: TrainConfig, step: int, stopped_by: str | None, saved: bool, best_step: int | None
) -> Outcome:
    """Return how the run ended. saved: whether its last checkpoint was written."""
    if stopped_by is not None:
        lost = "" if saved else "; its checkpoint could not be saved"
        return Outcome("preempted", PREEMPTED, step, f"stopped by {stopped_by}{lost}")
    if not saved:
        return Outcome("failed", FAILED, step, "the last checkpoint could not be saved")
    if step < config.num_steps:
        why = f"no evaluation since step {best_step} was better: evaluation.patience"
        return Outcome("done", DONE, step, why)
    return Outcome("done", DONE, step)


def main(argv: Sequence[str] | None = None) -> int:
    """Train from the command line and return the exit code."""
    is_main = os.environ.get("RANK", "0") == "0"
    try:
        arguments = parse_train(sys.argv[1:] if argv is None else argv)
        config = read_config(arguments.config, arguments.overrides)
        if arguments.dry_run:
            if is_main:
                print(describe(config), end="")
            return DONE
        return train(config, accept_changes=arguments.accept_change)
    except UserError as error:
        print_error(error, os.environ)
        return WRONG_USE


if __name__ == "__main__":
    sys.exit(main())
