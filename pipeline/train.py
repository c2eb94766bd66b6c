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
from pipeline.common.errors import DONE, FAILED, PREEMPTED, WRONG_USE, UserError
from pipeline.config import TrainConfig, read_config
from pipeline.data.order.mixture import reading_plan
from pipeline.data.stream import open_stream
from pipeline.data.stream.datasets import open_indexes
from pipeline.data.stream.device import DeviceBatches
from pipeline.distributed.outcome import Outcome, write_outcome
from pipeline.distributed.rendezvous import tell
from pipeline.distributed.runtime import Runtime, Stopped, StopRequest
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
    throw_away_loss,
)
from pipeline.training.run_directory import check_ranks, claimed
from pipeline.training.step import train_step


def train(config: TrainConfig, *, accept_changes: Sequence[str] = ()) -> int:
    """Run or resume a training and return its exit code; every process calls it.

    Raises UserError, before anything is written, if the processes, the data, the batch or the run
    directory do not fit.
    """
    config = config.resolved()
    # The processes, their data, and the right to write.
    runtime = Runtime.start(accumulation=config.accumulation, patience=config.watchdog.patience)
    run_dir = Path(config.run_dir)
    with ExitStack() as stack:
        stop = stack.enter_context(closing(StopRequest(run_dir)))
        with runtime.together():
            check_ranks(config, runtime)
            indexes = open_indexes(config.data)
            states = check_data(config, indexes)
        order = make_order(config, indexes)
        failures = stack.enter_context(claimed(config, accept_changes, order, runtime))
        watchdog = stack.enter_context(closing(Watchdog(config.watchdog, failures, runtime)))

        # The model, as the newest checkpoint left it; first `Strategy.warm_up`, a step thrown away.
        forward = make_forward(config, runtime.device)
        strategy = make_strategy(config, runtime)
        watchdog.enter("start", 0)
        strategy.warm_up(throw_away_loss(config, forward, strategy, runtime))
        checkpoints = Checkpoints(
            run_dir / "checkpoints",
            config.checkpoint,
            strategy=strategy,
            order=order,
            runtime=runtime,
        )
        stack.enter_context(closing(checkpoints))
        watchdog.enter("start", 0)
        step = first_step = checkpoints.restore()
        watchdog.enter("start", first_step)

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
        checkpoints.recall(monitor.past)
        batches = DeviceBatches(stream, runtime.device)
        meter = TrainingMeter(runtime, stream)
        ledger = Ledger(
            stream,
            indexes,
            split=config.data.split,
            prefetch=config.data.prefetch,
            runtime=runtime,
        )
        quarantine = Quarantine(run_dir, config.data, runtime)
        splits = held_out_splits(config, indexes, states)
        held_out = HeldOut(config, splits, forward, runtime, quarantine)
        views = views_of(strategy, config)

        def before_batch() -> None:
            watchdog.enter("evaluation", step)
            stop.check(runtime)

        def evaluate() -> bool:
            """Evaluate the weights of this step; tell whether they are the best so far."""
            with meter.paused():
                metrics = held_out.evaluate(views, step, monitor=monitor, before_batch=before_batch)
            return checkpoints.judge(metrics, step)

        def log() -> None:
            """Log what happened since the last log."""
            watchdog.enter("log", step)
            values = meter.read() | config.schedule_values((step - 1) * config.batch_size)
            values |= {"data/samples_seen": step * config.batch_size}
            values |= {"data/epoch": step * config.batch_size / order.num_samples}
            values |= quarantine.collect(stream) | ledger.read() | checkpoints.read()
            monitor.log(step, values)
            monitor.progress(step, values)
            check_skipped(values["optim/skipped_steps"], config)

        def save() -> None:
            watchdog.enter("checkpoint", step)
            with meter.paused():
                checkpoints.save(step)

        # At once, before anything is closed, which may take long; and then nobody barks any more.
        stack.enter_context(closing(watchdog))
        stack.enter_context(failures.recorded())
        stopped_by: str | None = None
        try:
            if runtime.from_main(monitor.lacks_evaluation):
                evaluate()
            last = config.is_over(step, checkpoints.evaluations_since_best)
            if not last:
                monitor.say(f"{runtime.place}; {reading_plan(order, runtime.world)}")
            while not last:
                watchdog.enter("data", step + 1)
                batch = next(batches)
                watchdog.enter("update", step + 1)
                # Held until the next step: see `train_step`.
                _held = train_step(
                    batch, step * config.batch_size, config, forward, strategy, meter
                )
                step += 1

                # Once in a while. Order matters: measure, then save what was measured.
                last, is_best = step >= config.num_steps, False
                if not last:
                    stop.check(runtime)
                if config.evaluates_at(step):
                    ledger.check_against_plan()
                    is_best = evaluate()
                    last = config.is_over(step, checkpoints.evaluations_since_best)
                if last or step % config.monitor.log_every_steps == 0:
                    log()
                if last or is_best or step % config.checkpoint.every_steps == 0:
                    save()
        except Stopped as reason:
            stopped_by = str(reason)
            if step > first_step:
                log()
                save()
        watchdog.enter("end", step)
        exit_code = finish(config, step, stopped_by, checkpoints, monitor, runtime)
        watchdog.close()  # what W&B still uploads may take its time
        return exit_code


def check_skipped(num_skipped: float, config: TrainConfig) -> None:
    """Raise if more updates were skipped than the config allows."""
    if num_skipped > config.max_skipped_steps:
        raise RuntimeError(
            f"{num_skipped:.0f} updates were skipped because their gradient was not finite: more "
            f"than max_skipped_steps {config.max_skipped_steps}. A lower "
            "optimizer.learning_rate.peak or an optimizer.max_grad_norm often helps; the last "
            "checkpoint holds finite weights."
        )


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
    if stopped_by is not None:
        lost = "" if saved else "; its checkpoint could not be saved"
        outcome = Outcome("preempted", PREEMPTED, step, f"stopped by {stopped_by}{lost}")
    elif not saved:
        outcome = Outcome("failed", FAILED, step, "the last checkpoint could not be saved")
    elif step < config.num_steps:
        why = f"no evaluation since step {checkpoints.best_step} was better: evaluation.patience"
        outcome = Outcome("done", DONE, step, why)
    else:
        outcome = Outcome("done", DONE, step)
    if runtime.is_main:
        write_outcome(Path(config.run_dir), outcome)
    then = outcome.message
    if stopped_by is not None:
        then += "; the same command resumes"
    monitor.say(f"{outcome.status} at step {step:,}" + (f": {then}" if then else ""))
    return outcome.exit_code or DONE


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
        tell(error, os.environ)
        return WRONG_USE


if __name__ == "__main__":
    sys.exit(main())
