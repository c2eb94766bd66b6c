"""Data that a run is only evaluated on: opened, found again, checked.

evaluation.data --index, split, shards--> EvaluatedSet of each, before anything starts
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.common.console import progress
from pipeline.common.errors import UserError
from pipeline.config import TrainConfig
from pipeline.data.index import Index
from pipeline.data.index.manifest import NoIndexError
from pipeline.data.index.reader import States
from pipeline.data.settings import DataConfig, DataSource
from pipeline.data.stream.datasets import check_shards
from pipeline.metrics.settings import setting_of
from pipeline.training.locations import DataSearch, Say, SeenDataSet, read_locations

# Data sets of the training have the smaller numbers: no two samples of a run have one uid.
FIRST_ORDINAL = 1 << 14


@dataclass(frozen=True)
class EvaluatedSet:
    """A data set that a run is only evaluated on."""

    name: str  # in evaluation.data; "": the only one
    data: DataConfig  # its location and split, the training's decoding, nothing augmented
    index: Index
    states: States  # of its shards

    @property
    def setting(self) -> str:
        """The setting that names it."""
        return setting_of(self.name)

    @property
    def seen(self) -> SeenDataSet:
        """What identifies its samples."""
        counts = self.index.counts(self.data.split)
        identity = self.index.split_identity(self.data.split)
        return SeenDataSet(self.index.dataset_id, identity, int(counts.sum()))


def open_evaluated(
    config: TrainConfig, say: Say = progress, run_dir: Path | None = None
) -> tuple[TrainConfig, tuple[EvaluatedSet, ...]]:
    """Open and check the data sets of evaluation.data; also those of a run that have moved.

    run_dir: None: that of the config. Returns the config with the locations where the data lies.
    Raises UserError for data that cannot be read, a split that is unknown or empty, or a network
    of a metric whose file is missing or another.
    """
    config.evaluation.check_files()
    own = dict(config.evaluation.own)
    sets: list[EvaluatedSet] = []
    for number, (name, wanted) in enumerate(own.items()):
        setting = setting_of(name)
        given = DataSource(path=wanted.path, shards=wanted.shards)
        ordinal = FIRST_ORDINAL + number
        source, index = _open(
            run_dir or Path(config.run_dir), config.data, given, name, setting, ordinal, say
        )
        location = {"path": source.path, "shards": source.shards}
        only = {"split": wanted.split, "mixture": (), "augmentations": ()}
        data = config.data.model_copy(update=location | only)
        if not index.counts(data.split, f"{setting}.split").any():
            raise UserError(
                f"{setting}.split = {data.split!r} holds no sample of {data.path}: name another "
                "split, or all."
            )
        suffixes = f"{setting}: data.decode.suffixes"
        index.check_suffixes(data.decode.member_suffixes, setting=suffixes, split=data.split)
        [states] = check_shards(data, [index])
        sets.append(EvaluatedSet(name, data, index, states))
        own[name] = wanted.model_copy(update=location)
    evaluation = config.evaluation.relocated(own)
    return config.model_copy(update={"evaluation": evaluation}), tuple(sets)


def _open(
    run_dir: Path,
    data: DataConfig,
    source: DataSource,
    name: str,
    setting: str,
    ordinal: int,
    say: Say,
) -> tuple[DataSource, Index]:
    """Open one data set where the settings say, or where an earlier start of the run found it."""
    locations = read_locations(run_dir)
    seen = None if locations is None else locations.evaluated.get(name)
    options = (f"{setting}.path=PATH", f"{setting}.shards=PATH")
    try:
        path, index = source.path, Index.open(source.path, ordinal, data.remote)
    except NoIndexError as error:
        if locations is None or seen is None:
            text = str(error).replace("data.path", f"{setting}.path")
            raise UserError(f"{setting}: {text}") from None
        search = DataSearch(run_dir, locations, data.remote, options, say, "evaluated on")
        path, index = search.index(search.candidates(source.path), ordinal, seen.dataset_id)
    except UserError as error:
        raise UserError(f"{setting}: {error}") from None
    if locations is None or seen is None:
        return source, index
    search = DataSearch(run_dir, locations, data.remote, options, say, "evaluated on")
    return search.source(source, path, index), index


def check_evaluated(
    run_dir: Path,
    former: Mapping[str, SeenDataSet],
    sets: Sequence[EvaluatedSet],
) -> None:
    """Raise UserError if a run was evaluated on other samples under the same name."""
    for one in sets:
        then, now = former.get(one.name), one.seen
        if then is None or (then.dataset_id, then.split) == (now.dataset_id, now.split):
            continue
        what = "data set" if then.dataset_id != now.dataset_id else "split"
        ids = f"{then.dataset_id} / {then.split}, now {now.dataset_id} / {now.split}"
        raise UserError(
            f"{one.setting}: {one.data.path} is another {what} than the one that {run_dir} was "
            f"evaluated on (there {ids}), so its figures could not be compared: give the former "
            f"data, set another run_dir, or, if you mean it, add --accept-change={one.setting}"
        )
