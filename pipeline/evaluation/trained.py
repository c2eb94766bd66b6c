"""Evaluation of what a run has trained: a checkpoint, raw and averaged weights."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.checkpoints.folder import Weights, read_state
from pipeline.common.console import progress
from pipeline.common.errors import UserError
from pipeline.config import TrainConfig
from pipeline.data.index import Index
from pipeline.data.settings import DataConfig
from pipeline.distributed.runtime import Runtime
from pipeline.evaluation.card import EVALUATIONS, Card, Identity, is_writable
from pipeline.evaluation.held_out import PREFIXES, HeldOut, Views
from pipeline.evaluation.request import EvaluationRequest, on_data, one_data_set
from pipeline.evaluation.splits import held_out_splits
from pipeline.monitoring.bad_samples import Quarantine
from pipeline.monitoring.sheets import Sheet, write_sheet
from pipeline.training.build import check_data, make_forward, move_model
from pipeline.training.evaluated import FIRST_ORDINAL, EvaluatedSet, open_evaluated
from pipeline.training.loading import Step, choose_checkpoint, load_config, load_run
from pipeline.training.locations import find_data, read_locations
from pipeline.training.resizing import decode_at
from pipeline.training.run_directory import check_ranks

AS_TRAINED = EvaluationRequest()
NOTHING: Mapping[str, str] = {}


def evaluate_run(
    run_dir: Path,
    *,
    step: Step | None = None,
    request: EvaluationRequest = AS_TRAINED,
    data: Sequence[str] = (),
    shards: Sequence[str] = (),
    out: Path | None = None,
) -> Card:
    """Evaluate a checkpoint of a run; the figures have the names that the training logs.

    The main process writes the card, and the pictures, to the folder `out`; None: to the folder
    `evaluations` of the run, under a name that step and evaluation have.

    step: None: the newest checkpoint that verifies. data, shards: where the data sets of the
    training, and their shards, lie now; empty: they are looked for, see `training.locations`, if
    it is they that are evaluated, as they are instead of evaluation.data if given. A single `data`
    that is another data set is evaluated instead: all of its samples, unless the request names a
    split. Raises UserError if there is no such run, checkpoint, data or split, or if the model
    takes no pictures of that size.
    """
    config = load_config(run_dir)
    runtime = Runtime.start(accumulation=1)
    check_ranks(config.batch_size, config.accumulation, runtime.world)
    say = progress if runtime.is_main else lambda _: None
    other = _other_data(run_dir, config.data, data)
    if config.evaluation.own and other is None and (data or shards) and request.split is None:
        request = replace(request, split=config.evaluation.split)  # of the training's data
    decode = decode_at(request.size, config.model, config.data.decode, str(run_dir))
    config = request.applied(config, decode)
    indexes: tuple[Index, ...] = ()  # of the training's data, or of another data set
    if other is not None:
        path, place = one_data_set(data, shards)
        split = request.split or _split_in_training(run_dir, config, other)
        config, indexes = on_data(config, path, place, split), (other,)
        say(f"data: {path} is another data set than the one that {run_dir} was trained on")
    elif not config.evaluation.own:
        found, indexes = find_data(run_dir, config.data, paths=data, shards=shards, say=say)
        config = config.model_copy(update={"data": found})
    config, evaluated = open_evaluated(config, say, run_dir)
    quarantine = Quarantine(None if other else run_dir, config.data, runtime)
    held_out = open_held_out(config, indexes, runtime, quarantine, evaluated)
    kept = [prefix for prefix in PREFIXES if prefix == "eval" or config.ema_decay is not None]
    # Chosen once for both views: a running training may save and remove checkpoints.
    chosen = _step_of(run_dir, config, step, PREFIXES[kept[-1]], runtime)
    views: dict[str, Callable[[], Any]] = {}
    digests: dict[str, str] = {}
    for prefix in kept:
        run = load_run(run_dir, step=chosen, weights=PREFIXES[prefix], config=config)
        digests[prefix] = run.weights_sha256
        views[prefix] = partial(nullcontext, move_model(run.model, config, runtime.device))
    model = {"run": str(run_dir), "weights_sha256": digests}
    notes = () if other is None else ("the run was trained on another data set",)
    identity = Identity.of(config, held_out.splits)
    out = out or run_dir / EVALUATIONS / f"step-{chosen}-{identity.evaluation_id}"
    return measured(held_out, views, chosen, model=model, out=out, notes=notes)


def _step_of(
    run_dir: Path, config: TrainConfig, step: Step | None, weights: Weights, runtime: Runtime
) -> int:
    """Return the step of the checkpoint that the main process chooses; a collective."""
    chosen: int | None = None
    with runtime.sharing_errors():
        if runtime.is_main:
            chosen = read_state(choose_checkpoint(run_dir, config, step, weights)).step
    chosen = runtime.broadcast(chosen)
    assert chosen is not None
    return chosen


def open_held_out(
    config: TrainConfig,
    indexes: Sequence[Index],
    runtime: Runtime,
    quarantine: Quarantine,
    evaluated: Sequence[EvaluatedSet] = (),
) -> HeldOut:
    """Check the data, and return what evaluates on it. evaluated: see `open_evaluated`."""
    states = check_data(config, indexes) if indexes else ()
    splits = held_out_splits(config, indexes, states, evaluated)
    forward = make_forward(config, runtime.device)
    return HeldOut(config, splits, forward, runtime, quarantine)


def measured(
    held_out: HeldOut,
    views: Views,
    step: int | None,
    *,
    model: Mapping[str, Any],
    out: Path | None,
    notes: tuple[str, ...] = (),
    left_out: Mapping[str, str] = NOTHING,
) -> Card:
    """Evaluate the views, and return the card; a collective.

    out: folder to which the main process writes the card and pictures. If that cannot be written
    to, a warning says so. step: None: not known. left_out: figures without a meaning, and why.
    """
    runtime, config = held_out.runtime, held_out.config
    writes = out is not None and runtime.is_main and is_writable(out)

    def show(step: int, name: str, sheet: Sheet) -> None:
        if out is not None and writes:
            write_sheet(out, step, name, sheet)

    figures = held_out.evaluate(views, step or 0, show=None if out is None else show)
    card = Card(
        identity=Identity.of(config, held_out.splits),
        model=model,
        step=step,
        figures={name: value for name, value in figures.items() if name not in left_out},
        precision=config.precision,
        seed=config.seed,
        in_nats=config.model.likelihood.is_nats,
        notes=(*notes, *left_out.values()),
    )
    return card if out is None or not writes else card.written(out)


def _other_data(run_dir: Path, data: DataConfig, paths: Sequence[str]) -> Index | None:
    """Return the index of a data set that the run was not trained on; None for what it knows.

    None also for what cannot be read, which `find_data` says in words.
    """
    locations = read_locations(run_dir)
    if len(paths) != 1 or locations is None or locations.dataset_id is None:
        return None
    try:
        # The number of data that a training is only evaluated on: noise depends on it.
        index = Index.open(paths[0], FIRST_ORDINAL, data.remote)
    except UserError:
        return None
    trained = {locations.dataset_id, *(one.dataset_id for one in locations.data_sets)}
    return None if index.dataset_id in trained else index


def _split_in_training(run_dir: Path, config: TrainConfig, index: Index) -> str | None:
    """Return the split by which the training itself evaluates a data set; None: it does not."""
    locations = read_locations(run_dir)
    seen = {} if locations is None else locations.evaluated
    splits = (
        one.split
        for name, one in config.evaluation.own.items()
        if name in seen and seen[name].dataset_id == index.dataset_id
    )
    return next(splits, None)
