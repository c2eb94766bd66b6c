"""Evaluation of what a run has trained: a checkpoint, raw and averaged weights."""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from pipeline.checkpoints.folder import read_state
from pipeline.common.console import progress
from pipeline.data.decode.image import Size
from pipeline.distributed.runtime import Runtime
from pipeline.evaluation.held_out import PREFIXES, HeldOut, Views
from pipeline.evaluation.splits import held_out_splits
from pipeline.monitoring.bad_samples import Quarantine
from pipeline.monitoring.sheets import write_sheet
from pipeline.training.build import check_data, make_forward, move_model
from pipeline.training.loading import Step, choose_checkpoint, load_config, load_run
from pipeline.training.locations import find_data
from pipeline.training.resizing import decode_at
from pipeline.training.run_directory import check_ranks


def evaluate_run(
    run_dir: Path,
    *,
    step: Step | None = None,
    split: str | None = None,
    size: Size | None = None,
    data: Sequence[str] = (),
    shards: Sequence[str] = (),
) -> dict[str, float]:
    """Evaluate a checkpoint of a run; the metrics have the names that the training logs.

    step: None: the newest checkpoint that verifies. split: None: the config's held-out split. size:
    of the pictures, of a fully convolutional model; None: the training's. data, shards: where the
    data sets of the training, and their shards, lie now; empty: they are looked for, see
    `training.locations`. Raises UserError if there is no such run, checkpoint, data or split, or if
    the model takes no pictures of that size.
    """
    config = load_config(run_dir)
    decode = decode_at(size, config.model, config.data.decode, str(run_dir))
    runtime = Runtime.start(accumulation=1)
    check_ranks(config.batch_size, config.accumulation, runtime.world)
    say = progress if runtime.is_main else lambda _: None
    trained, indexes = find_data(run_dir, config.data, paths=data, shards=shards, say=say)
    # Nothing is augmented; an augmentation of the training need not fit the size.
    trained = trained.model_copy(update={"decode": decode, "augmentations": ()})
    config = config.model_copy(update={"data": trained})
    if split is not None:
        evaluation = config.evaluation.model_copy(update={"split": split})
        config = config.model_copy(update={"evaluation": evaluation})
    held_out = HeldOut(
        config,
        held_out_splits(config, indexes, check_data(config, indexes)),
        make_forward(config, runtime.device),
        runtime,
        Quarantine(run_dir, config.data, runtime),
    )
    kept = [prefix for prefix in PREFIXES if prefix == "eval" or config.ema_decay is not None]
    # Chosen once for both views: a running training may save and remove checkpoints.
    chosen: int | None = None
    with runtime.sharing_errors():
        if runtime.is_main:
            path = choose_checkpoint(run_dir, config, step, PREFIXES[kept[-1]])
            chosen = read_state(path).step
    chosen = runtime.broadcast(chosen)
    assert chosen is not None

    show = partial(write_sheet, run_dir / "evaluations")
    views: Views = {}
    for prefix in kept:
        run = load_run(run_dir, step=chosen, weights=PREFIXES[prefix], config=config)
        model = move_model(run.model, config, runtime.device)
        views[prefix] = partial(nullcontext, model)
    return {"step": chosen, **held_out.evaluate(views, chosen, show=show)}
