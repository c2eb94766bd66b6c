"""The images that an evaluation shows: chosen by a hash or by key, and the best and the worst.

    each micro-batch --> candidates of this process --> those of all processes --> Sheet

Only candidates are kept, in the memory of the host.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.common import rng
from pipeline.data.decode import Decode
from pipeline.data.index import Index
from pipeline.data.index.reader import ORDINAL_SHIFT
from pipeline.data.stream.datasets import SampleNames
from pipeline.distributed.runtime import Runtime
from pipeline.evaluation.pictures import picture_grid, picture_rows, picture_shape
from pipeline.metrics import EvaluatedBatch, MetricBase
from pipeline.monitoring.monitor import MonitorConfig
from pipeline.monitoring.sheets import Sheet

NUM_ROWS = 10  # best images, and worst images

Numbers = NDArray[Any]  # one per image
Rows = NDArray[np.uint8]  # pictures [n, H, 4W, C]


class Candidate(NamedTuple):
    """An image that may be shown. Equal scores are put in order by a hash of the sample."""

    score: float
    draw: int
    uid: int
    figures: dict[str, float]  # of the metrics, by name
    picture: NDArray[np.uint8] | None  # [H, 4W, C]; None: the data are no images


class Selection:
    """The `size` images with the smallest scores; the same on any number of processes."""

    def __init__(self, size: int, *, one_per_score: bool = False) -> None:
        """one_per_score: of images with one score keep only the first."""
        self._size, self._one_per_score = size, one_per_score
        self._kept: list[Candidate] = []

    def entering(self, scores: Numbers, draws: Numbers, uids: Numbers) -> list[int]:
        """Return the numbers of those images [n] that belong to the smallest so far."""
        ordered = np.lexsort((uids, draws, scores))
        if self._one_per_score:
            ordered = ordered[np.unique(scores[ordered], return_index=True)[1]]
        smallest = ordered[: self._size].tolist()
        if len(self._kept) < self._size:
            return smallest
        limit = self._kept[-1][:3]
        places = [*zip(scores.tolist(), draws.tolist(), uids.tolist(), strict=True)]
        return [i for i in smallest if places[i] < limit]

    def add(self, candidates: Sequence[Candidate]) -> None:
        """Keep the smallest of the former and the new candidates."""
        self._kept = self._chosen([*self._kept, *candidates])

    def gather(self, runtime: Runtime, shape: Sequence[int] | None) -> tuple[list[Candidate], Rows]:
        """Return the images of all processes, and their pictures; a collective.

        shape: of a picture; None: there are none.
        """
        bare = runtime.gather([candidate._replace(picture=None) for candidate in self._kept])
        chosen = self._chosen(list(chain.from_iterable(bare)))
        pictures = torch.zeros(len(chosen), *(shape or (0,)), dtype=torch.uint8)
        own = {candidate.uid: candidate.picture for candidate in self._kept}
        for row, candidate in enumerate(chosen):
            if (picture := own.get(candidate.uid)) is not None:
                pictures[row] = torch.from_numpy(picture)
        # Each process has some of the rows; the others are 0 there.
        return chosen, runtime.sum(pictures.to(runtime.device)).numpy(force=True)

    def _chosen(self, candidates: list[Candidate]) -> list[Candidate]:
        candidates = sorted(candidates, key=lambda candidate: candidate[:3])
        if self._one_per_score:
            first = {candidate.score: candidate for candidate in reversed(candidates)}
            candidates = [first[score] for score in sorted(first)]
        return candidates[: self._size]


class Gallery:
    """What is shown of an evaluation of one model on one or several data sets."""

    def __init__(
        self,
        config: MonitorConfig,
        ranking: MetricBase | None,
        *,
        decode: Decode,
        indexes: Sequence[Index],
    ) -> None:
        """ranking: see `ranking_of`. indexes: of the data sets."""
        self._decode, self._ranking = decode, ranking
        self._names = SampleNames(indexes)
        self._dataset_ids = {index.ordinal: index.dataset_id for index in indexes}
        self._wanted = {key: number for number, key in enumerate(dict.fromkeys(config.pictured))}
        self.missing: tuple[str, ...] = ()  # keys to picture that no image had; after `sheet`
        self._pictured = Selection(
            len(self._wanted) or config.num_images, one_per_score=bool(self._wanted)
        )
        self._best, self._worst = Selection(NUM_ROWS), Selection(NUM_ROWS)

    def add(self, batch: EvaluatedBatch, figures: Mapping[str, Tensor]) -> None:
        """Add a micro-batch. figures: values [B] of the metrics' `per_image`, by name."""
        slots = (batch.weight > 0).nonzero()[:, 0]
        if not len(slots):
            return
        uid = batch.uid[slots].cpu()
        uids, draws = uid.numpy(), self._draws(uid).numpy()
        values = {n: v[slots].double().numpy(force=True) for n, v in figures.items()}
        for selection, images, scores in self._scored(uids, values):
            entering = selection.entering(scores, draws[images], uids[images])
            if not entering:
                continue
            images = images[entering]
            chosen = slots[torch.from_numpy(images).to(slots.device)]
            clean, corrupted = batch.clean[chosen], batch.corrupted[chosen]
            pictures = picture_rows(clean, corrupted, batch.mean[chosen], self._decode)
            candidates = [
                Candidate(
                    float(scores[number]),
                    int(draws[image]),
                    int(uids[image]),
                    {name: float(value[image]) for name, value in values.items()},
                    None if pictures is None else pictures[row],
                )
                for row, (number, image) in enumerate(zip(entering, images, strict=True))
            ]
            selection.add(candidates)

    def sheet(self, runtime: Runtime) -> Sheet:
        """Return what is to be shown: on the main process, empty on others; a collective."""
        shape = picture_shape(self._decode)
        selections = {"pictured": self._pictured, "best": self._best, "worst": self._worst}
        found = {name: it.gather(runtime, shape) for name, it in selections.items()}
        shown = {candidate.score for candidate in found["pictured"][0]}
        self.missing = tuple(key for key, number in self._wanted.items() if number not in shown)
        if not runtime.is_main:
            return Sheet({})
        contents: dict[str, Any] = {}
        if self._ranking is not None:
            contents["rows_by"] = self._ranking.ranked_by
        contents |= {name: self._named(chosen) for name, (chosen, _) in found.items() if chosen}
        pictures: dict[str, Rows] = {}
        if shape is not None:
            by_rank = np.concatenate([found["best"][1], found["worst"][1]])
            grids = {"": found["pictured"][1], "best_worst": by_rank}
            pictures = {kind: picture_grid(rows) for kind, rows in grids.items() if len(rows)}
        return Sheet(pictures, contents)

    def _scored(
        self, uids: Numbers, figures: Mapping[str, Numbers]
    ) -> Iterator[tuple[Selection, Numbers, Numbers]]:
        """Yield selections, the numbers of the images that may be in them, and their scores."""
        images = np.arange(len(uids))
        if self._wanted:
            numbers = [self._wanted.get(key, -1) for key in self._names.keys(uids)]
            images = np.flatnonzero(np.array(numbers) >= 0)
            yield self._pictured, images, np.array(numbers, np.float64)[images]
        else:
            yield self._pictured, images, np.zeros(len(images))
        if self._ranking is not None and self._ranking.ranked_by is not None:
            errors = figures[self._ranking.ranked_by]
            errors = -errors if self._ranking.higher_is_better else errors
            errors = np.where(np.isnan(errors), np.inf, errors)
            yield self._best, np.arange(len(uids)), errors
            yield self._worst, np.arange(len(uids)), -errors

    def _draws(self, uid: Tensor) -> Tensor:
        """Hashes int64 [B] of samples: of the data set's id and the position in it, no more."""
        position, draws = uid & ((1 << ORDINAL_SHIFT) - 1), torch.zeros_like(uid)
        for ordinal in (uid >> ORDINAL_SHIFT).unique().tolist():
            name = f"evaluation/shown/{self._dataset_ids[ordinal]}"
            hashed = rng.sample_keys(0, name, epoch=torch.zeros_like(uid), uid=position)
            draws = hashed.where(uid >> ORDINAL_SHIFT == ordinal, draws)
        return draws

    def _named(self, chosen: Sequence[Candidate]) -> list[dict[str, Any]]:
        """Entries of the file, in the order of the rows."""
        names = (self._names.key_and_shard(candidate.uid) for candidate in chosen)
        return [
            {"key": key, "shard": shard, **candidate.figures}
            for (key, shard), candidate in zip(names, chosen, strict=True)
        ]
