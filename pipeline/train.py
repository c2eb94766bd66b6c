"""Training, as `latentmill train CONFIG [a.b=c ...]` starts it; the same command resumes.

`train` is the whole run, top to bottom. One step consumes a global batch: every process takes its
slots of it, in `accumulation` micro-batches.
"""

import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path

from pipeline.common import needs

if __name__ == "__main__":
    needs.check()  # before anything of the extra is imported

from pipeline.checkpoints.manager import Checkpoints
from pipeline.common.arguments import parse_train
from pipeline.common.console import progress
from pipeline.common.errors import DONE, FAILED, PREEMPTED, WRONG_USE, UserError
from pipeline.common.leaving import leave
from pipeline.config import TrainConfig, read_config
from pipeline.data.order.mixture import reading_plan
from pipeline.data.stream import open_stream
from pipeline.data.stream.device import DeviceBatches
from pipeline.distributed.outcome import Outcome, write_outcome
from pipeline.distributed.rendezvous import print_error
from pipeline.distributed.runtime import Runtime, Stopped, StopRequest
from pipeline.distributed.watchdog import Watchdog
from pipeline.evaluation.card import Identity, record_identity
from pipeline.evaluation.held_out import HeldOut, views_of
from pipeline.evaluation.splits import held_out_splits
from pipeline.monitoring.bad_samples import Quarantine
from pipeline.monitoring.ledger import Ledger
from pipeline.monitoring.meter import TrainingMeter
from pipeline.monitoring.monitor import Monitor
from pipeline.training.build import (
    check_data,
    make_forward,
    make_order,
    make_strategy,
    warm_up_loss,
)
from pipeline.training.describe import describe
from pipeline.training.evaluated import open_evaluated
from pipeline.training.locations import open_data
from pipeline.training.memory import check_memory
from pipeline.training.run_directory import check_ranks, locked_run_dir
from pipeline.training.start import initial_weights, start
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
            check_ranks(config.batch_size, config.accumulation, runtime.world)
            check_memory(config, runtime)
            say = progress if runtime.is_main else lambda _: None
            config, indexes = open_data(config, say)
            states = check_data(config, indexes)
            config, evaluated = open_evaluated(config, say)
            order = make_order(config, indexes)
            initial = initial_weights(config, order) if runtime.is_main else None
        failures = stack.enter_context(
            locked_run_dir(config, accept_changes, order, evaluated, runtime)
        )
        watchdog = stack.enter_context(closing(Watchdog(config.watchdog, failures, runtime)))

        # Build the model, warm up, restore the newest checkpoint or load the first weights.
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
            step = first_step = start(
                config,
                initial,
                order,
                strategy=strategy,
                checkpoints=checkpoints,
                runtime=runtime,
            )
        del initial  # the memory of its weights

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
        splits = held_out_splits(config, indexes, states, evaluated)
        if runtime.is_main:
            record_identity(run_dir, Identity.of(config, splits))
        ledger = Ledger(
            stream,
            indexes,
            split=config.data.split,
            prefetch=config.data.prefetch,
            runtime=runtime,
        )
        held_out = HeldOut(config, splits, forward, runtime, quarantine)
        views = views_of(strategy, config)
        batches = DeviceBatches(stream, runtime.device)
        meter = TrainingMeter(runtime, stream)

        def evaluate(step: int) -> bool:
            """Evaluate the weights of `step`; return whether they are the best so far."""

            def before_batch() -> None:
                watchdog.enter("evaluation", step)
                stop.check(runtime)

            with meter.paused():
                metrics = held_out.evaluate(views, step, monitor=monitor, before_batch=before_batch)
            return checkpoints.add_evaluation(metrics, step)

        def log(step: int) -> None:
            """Log what happened since the last log."""
            watchdog.enter("log", step)
            samples = step * config.batch_size
            values = meter.read() | config.schedule_values(samples - config.batch_size)
            values |= {"data/samples_seen": samples, "data/epoch": samples / order.num_samples}
            values |= quarantine.collect(stream) | ledger.read() | checkpoints.read()
            monitor.log(step, values)
            monitor.progress(step, values)
            check_skipped(values["optim/skipped_steps"], config)

        def save(step: int) -> None:
            watchdog.enter("checkpoint", step)
            with meter.paused():
                checkpoints.save(step)

        # Record a failure before anything is closed, which may take minutes, and stop the watchdog.
        stack.enter_context(closing(watchdog))
        stack.enter_context(failures.recorded())
        stopped_by: str | None = None
        try:
            if runtime.broadcast(monitor.lacks_evaluation):
                evaluate(step)
            last = config.is_over(step, checkpoints.evaluations_since_best)
            if not last:
                monitor.print_line(f"{runtime.hardware}; {reading_plan(order, runtime.world)}")
                for index in indexes:
                    for line in index.left_out_lines(only_losses=True):
                        monitor.print_line(f"{index.path}: {line}")
            while not last:
                step += 1
                watchdog.enter("data", step)
                batch = next(batches)
                watchdog.enter("update", step)
                # Kept until the next step: see `train_step`.
                _kept = train_step(
                    batch, (step - 1) * config.batch_size, config, forward, strategy, meter
                )

                # Evaluate before saving, so that the checkpoint of a new best value is kept.
                last, is_best = step >= config.num_steps, False
                if not last:
                    stop.check(runtime)
                if config.evaluates_at(step):
                    ledger.check_against_plan()
                    is_best = evaluate(step)
                    last = config.is_over(step, checkpoints.evaluations_since_best)
                if last or step % config.monitor.log_every_steps == 0:
                    log(step)
                if last or is_best or step % config.checkpoint.every_steps == 0:
                    save(step)
        except Stopped as reason:
            stopped_by = str(reason)
            if step > first_step:
                log(step)
                save(step)
        watchdog.enter("end", step)
        exit_code = finish(config, step, stopped_by, checkpoints, monitor, runtime)
        watchdog.close()  # W&B may upload for longer than the watchdog allows
        return exit_code


def finish(
    config: TrainConfig,
    step: int,
    stopped_by: str | None,
    checkpoints: Checkpoints,
    monitor: Monitor,
    runtime: Runtime,
) -> int:
    """Wait for the last checkpoint, record how the run ended and return the exit code."""
    saved = checkpoints.finish()
    outcome = outcome_of(config, step, stopped_by, saved, checkpoints.best_step)
    if runtime.is_main:
        write_outcome(Path(config.run_dir), outcome)
    monitor.exit_code = outcome.exit_code or DONE
    then = outcome.message
    if stopped_by is not None:
        then += "; the same command resumes"
    monitor.print_line(f"{outcome.status} at step {step:,}" + (f": {then}" if then else ""))
    return monitor.exit_code


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
        if arguments.dry_run or arguments.check:
            # `launch` sets it before it starts any process.
            announced = os.environ.get("WORLD_SIZE", "")
            world = max(int(announced), 1) if announced.isdecimal() else 1
            check_ranks(config.batch_size, config.accumulation, world)
            if is_main:
                text = describe(config, world=world, with_costs=arguments.dry_run)
                print(text if arguments.dry_run else "", end="")
            return DONE
        return train(config, accept_changes=arguments.accept_change)
    except UserError as error:
        print_error(error, os.environ)
        return WRONG_USE


if __name__ == "__main__":
    leave(main())
