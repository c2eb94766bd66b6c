"""Where a run and its data lay, and where the data lies now: it is found again by its id.

a place in the settings -> as written | from where the run was started | moved along with the run
                        -> the first whose index has the id that the run was trained on

The run's locations.json says where its newest start found things; runs of 93dd2d6 have none.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

from pipeline.checkpoints.manager import newest_state
from pipeline.common.console import progress
from pipeline.common.errors import UserError
from pipeline.common.files import write_json
from pipeline.common.strict.dialect import parse
from pipeline.config import TrainConfig
from pipeline.data.index import Index
from pipeline.data.index.manifest import NoIndexError
from pipeline.data.order.mixture import Mixture, dataset_id_of
from pipeline.data.settings import DataConfig, DataSource
from pipeline.data.storage import RemotePolicy, is_url
from pipeline.data.storage.opening import local_path
from pipeline.training.loading import load_config

LOCATIONS = "locations.json"
Say = Callable[[str], None]
# How a person names the locations of index and shards.
OVERRIDES = ("data.path=PATH", "data.shards=PATH")
OPTIONS = ("--data PATH", "--shards PATH")


@dataclass(frozen=True)
class SeenDataSet:
    """A data set as a start saw it."""

    dataset_id: str
    split: str  # identity of the samples that were trained on, see `Index.split_identity`
    samples: int  # of that split


@dataclass(frozen=True)
class Locations:
    """Where the newest start of a run found things."""

    run_dir: str  # absolute; without started_in: as its config says
    started_in: str | None  # the current directory then; None: not known
    data_sets: tuple[SeenDataSet, ...]  # as in the config; empty: not known
    dataset_id: str | None  # of all together; None: not known
    # Those that the run is only evaluated on, by their names in evaluation.data.
    evaluated: Mapping[str, SeenDataSet] = field(default_factory=dict)

    def candidates(self, place: str, run_dir: Path) -> list[str]:
        """Where a place in the settings may be by now, the most likely first; a URL stays."""
        if is_url(place):
            return [place]
        began = Path(self.started_in or "", local_path(place))
        found = [began] if self.started_in else []
        if began.is_absolute() == Path(self.run_dir).is_absolute():
            from_run = os.path.relpath(began, self.run_dir)
            found += [run_dir.absolute() / from_run, run_dir.resolve() / from_run]
        unique = {_absolute(local_path(place)): place}
        for path in map(_absolute, found):
            unique.setdefault(path, path)
        return list(unique.values())

    def id_of(self, number: int, count: int) -> str | None:
        """The id of one of `count` data sets; None if it is not known."""
        if len(self.data_sets) == count:
            return self.data_sets[number].dataset_id
        return self.dataset_id if count == 1 else None


def _absolute(path: str | Path) -> str:
    """The path from the root, without `..`; symbolic links stay."""
    return os.path.normpath(Path(path).absolute())


def record_locations(run_dir: Path, order: Mixture, evaluated: Mapping[str, SeenDataSet]) -> None:
    """Write down where this start of a run lies, and what it reads."""
    data_sets = [
        {"dataset_id": part.dataset_id, "split": part.split, "samples": part.num_samples}
        for part in order.orders
    ]
    locations = {"run_dir": str(run_dir.absolute()), "started_in": str(Path.cwd())}
    seen = {name: asdict(one) for name, one in evaluated.items()}
    locations |= {"evaluated": seen} if seen else {}
    write_json(run_dir / LOCATIONS, {**locations, "data_sets": data_sets})


def read_locations(run_dir: Path) -> Locations | None:
    """Return the locations of a run's newest start; None where there is no run."""
    try:
        found = json.loads((run_dir / LOCATIONS).read_bytes())
        seen = tuple(SeenDataSet(**one) for one in found["data_sets"])
        ids = dataset_id_of([one.dataset_id for one in seen])
        evaluated = {n: SeenDataSet(**one) for n, one in found.get("evaluated", {}).items()}
        return Locations(found["run_dir"], found["started_in"], seen, ids, evaluated)
    except (OSError, ValueError, TypeError, KeyError):
        return _locations_without_file(run_dir)


def _locations_without_file(run_dir: Path) -> Locations | None:
    """What config and checkpoint of a run of 93dd2d6, or of a copy in part, tell."""
    try:
        settings, _ = parse((run_dir / "config.yaml").read_text(encoding="utf-8"))
    except OSError:
        return None
    began = cast(dict[str, Any], settings).get("run_dir") if isinstance(settings, dict) else None
    newest = newest_state(run_dir / "checkpoints")
    return Locations(str(began or run_dir), None, (), newest and newest[1].dataset_id)


def open_data(config: TrainConfig, say: Say = progress) -> tuple[TrainConfig, tuple[Index, ...]]:
    """Open the indexes of a training; if it goes on with a run, also those of data that has moved.

    Returns the config with the locations where the data lies. Raises UserError.
    """
    run_dir, data = Path(config.run_dir), config.data
    found = [open_source(run_dir, data, number, say) for number in range(len(data.sources))]
    data = _with_sources(data, [source for source, _ in found])
    return config.model_copy(update={"data": data}), tuple(index for _, index in found)


def open_source(run_dir: Path, data: DataConfig, number: int, say: Say) -> tuple[DataSource, Index]:
    """Open one data set of a training that may go on with the run in `run_dir`.

    An index that is where the settings say is taken, whatever its id: `checkpoints.manager`
    compares it. Raises UserError.
    """
    source, locations = data.sources[number], read_locations(run_dir)
    if locations is None or locations.dataset_id is None:
        return source, Index.open(source.path, number, data.remote)
    search = DataSearch(run_dir, locations, data.remote, OVERRIDES, say)
    try:
        path, index = source.path, Index.open(source.path, number, data.remote)
    except NoIndexError:
        former = load_config(run_dir).data.sources
        if len(former) != len(data.sources):
            raise
        known = search.candidates(source.path, former[number].path)
        path, index = search.index(known, number, locations.id_of(number, len(former)))
    return search.source(source, path, index), index


def find_data(
    run_dir: Path,
    data: DataConfig,
    *,
    paths: Sequence[str] = (),
    shards: Sequence[str] = (),
    options: tuple[str, str] = OPTIONS,
    say: Say = progress,
) -> tuple[DataConfig, tuple[Index, ...]]:
    """Open the indexes of the very data that a run was trained on, wherever it lies now.

    data: of the run's config; returned with the locations where the data lies. paths, shards: the
    locations of all its data sets, given by a person through the `options`. Raises UserError, which
    says where it was looked for.
    """
    sources, locations = data.sources, read_locations(run_dir)
    assert locations is not None, "its config has been read"
    for option, given in zip(options, (paths, shards), strict=True):
        if given and len(given) != len(sources):
            listed = ", ".join(source.path for source in sources)
            raise UserError(
                f"{run_dir} was trained on {len(sources)} data sets ({listed}): give {option} "
                f"{len(sources)} times, in their order, not {len(given)} times."
            )
    search = DataSearch(run_dir, locations, data.remote, options, say)
    found: list[DataSource] = []
    indexes: list[Index] = []
    for number, source in enumerate(sources):
        known = (paths[number],) if paths else search.candidates(source.path)
        wanted = locations.id_of(number, len(sources))
        path, index = search.index(known, number, wanted)
        roots = (shards[number],) if shards else ()
        found.append(search.source(source, path, index, roots))
        indexes.append(index)
    together = dataset_id_of([index.dataset_id for index in indexes])
    if locations.dataset_id not in (None, together):
        raise UserError(
            f"{run_dir} was trained on other data sets (id {locations.dataset_id} of all together) "
            f"than lie in {', '.join(one.path for one in found)} ({together}): name their "
            f"locations by {options[0]}."
        )
    for index, seen in zip(indexes, locations.data_sets, strict=False):
        if index.split_identity(data.split) != seen.split:
            say(
                f"warning: the index in {index.path} divides the data by another rule than the one "
                "in the training: samples that are held out now may have been trained on"
            )
    return _with_sources(data, found), tuple(indexes)


def _with_sources(data: DataConfig, sources: Sequence[DataSource]) -> DataConfig:
    if data.path is None:
        return data.model_copy(update={"mixture": tuple(sources)})
    return data.model_copy(update={"path": sources[0].path, "shards": sources[0].shards})


@dataclass(frozen=True)
class DataSearch:
    """Looks for the data sets of one run; its methods raise UserError."""

    run_dir: Path
    locations: Locations
    remote: RemotePolicy
    options: tuple[str, str]  # that name the locations of index and shards
    say: Say
    use: str = "trained on"  # what the run did with the data

    def candidates(self, *known: str) -> list[str]:
        """Where locations in the settings may be by now."""
        found = [path for one in known for path in self.locations.candidates(one, self.run_dir)]
        return list(dict.fromkeys(found))

    def index(self, paths: Iterable[str], number: int, wanted: str | None) -> tuple[str, Index]:
        """Return the first of the paths whose index has the id that is wanted, and the index."""
        looked: list[str] = []
        for path in paths:
            try:
                index = Index.open(path, number, self.remote)
            except NoIndexError:
                looked.append(f"{path} (no index there)")
            except UserError as error:
                looked.append(f"{path} ({str(error).removesuffix('.')})")
            else:
                if wanted in (None, index.dataset_id):
                    return path, index
                looked.append(f"{path} (data set {index.dataset_id})")
        raise UserError(
            f"The data set that {self.run_dir} was {self.use} (id {wanted or 'not known'}) is not "
            f"found; looked at: {', '.join(looked)}. Name the directory or URL that holds its "
            f"`index/` by {self.options[0]}; it must be the same data set."
        )

    def source(
        self, source: DataSource, path: str, index: Index, roots: Sequence[str] = ()
    ) -> DataSource:
        """Return a data set with the locations of its index and its shards; UserError for none.

        roots: where the shards are looked for; empty: where the settings say, and beside the index.
        """
        if path != source.path:
            self.say(f"data: {source.path} of {self.run_dir} is read from {path}")
        if not roots:
            roots = [path] if source.shards is None else [*self.candidates(source.shards), path]
        fits = {root: _fits(root, index) for root in roots}
        # If none is as indexed, one that has changed: `Index.check_shards` says how.
        there = [root for root in roots if fits[root]] or [r for r in roots if fits[r] is False]
        if not there:
            raise UserError(
                f"The shards of the data set that {self.run_dir} was {self.use} (id "
                f"{index.dataset_id}) are not found: {index.shards[0].name} is in none of "
                f"{', '.join(roots)}. Put them back, or name their place by {self.options[1]}."
            )
        root = there[0]
        if root not in (source.shards, path):
            self.say(f"data: the shards of {source.path} are read from {root}")
        shards = None if source.shards is None and root == path else root
        return source.model_copy(update={"path": path, "shards": shards})


def _fits(root: str, index: Index) -> bool | None:
    """Whether the first shard lies there as indexed; None: it is not there. A URL is believed."""
    if is_url(root) or not index.shards:
        return True
    first = index.shards[0]
    try:
        return (Path(local_path(root)) / first.name).stat().st_size == first.bytes
    except OSError:
        return None
