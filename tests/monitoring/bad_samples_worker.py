"""One rank of a test: takes one batch, collects its bad samples and writes how that ended.

python -m tests.monitoring.bad_samples_worker SHARDS RUN_DIR (under accelerate launch)
"""

import sys
from pathlib import Path

from pipeline.common.errors import DONE, UserError
from pipeline.common.leaving import leave
from pipeline.data.index import Index
from pipeline.data.settings import DataConfig
from pipeline.distributed.runtime import Runtime
from pipeline.monitoring.bad_samples import Quarantine
from tests.data.streams import ARRAYS, SEED, SETTINGS
from tests.shards import open_stream


def main(shards: str, run_dir: str) -> None:
    runtime = Runtime.start(accumulation=1)
    data = DataConfig(path=shards, decode=ARRAYS, max_bad_fraction=0.0, **SETTINGS)
    with open_stream(
        data,
        index=Index.open(shards),
        seed=SEED,
        batch_size=12,
        num_steps=1,
        rank=runtime.rank,
        world=runtime.world,
    ) as stream:
        next(stream)
        ending = "no error"
        try:
            Quarantine(Path(run_dir), data, runtime).collect(stream)
        except UserError as error:
            ending = str(error)
        met = f"met {stream.counters.tombstones}: {ending}"
    Path(run_dir, f"rank-{runtime.rank}.txt").write_text(met)
    leave(DONE)


if __name__ == "__main__":
    main(*sys.argv[1:])
