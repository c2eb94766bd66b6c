"""The reader of a finished export: rows by number, slice and key; batches over ranks and workers.

    manifest.json, _SUCCESS --manifest.py--> what there is, of which model
    keys.parquet --keys.py--> key -> row number
    data/<kind>/<shard> --formats/--> arrays, by memory map where the files are local
    (seed, epoch, step, rank) --batches.py, by order-v1--> row numbers -> LatentRows

Nothing here imports torch: reading latents needs numpy and pyarrow only.
"""

from pipeline.common.labels import NO_LABEL
from pipeline.latents.dataset import LatentDataset
from pipeline.latents.keys import UnknownKeyError
from pipeline.latents.rows import LatentRow, LatentRows

__all__ = ["NO_LABEL", "LatentDataset", "LatentRow", "LatentRows", "UnknownKeyError"]
