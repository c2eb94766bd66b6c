"""The files of a pack besides its shards: their names, sidecars, `pack.json`.

records of the parts --shard_names--> part number -> shard name, without gaps
                     --closing_files--> sidecars, `broken.jsonl`, and last `pack.json`
"""

import json
from collections.abc import Sequence
from typing import Any

from pipeline.common.console import printable
from pipeline.common.errors import UserError
from pipeline.data.pack.parts import PartRecord
from pipeline.data.pack.sources.base import Samples

STAGE = "_stage"
PLAN = f"{STAGE}/plan.json"
SUMMARY = "pack.json"
BROKEN = "broken.jsonl"


def shard_name(number: int) -> str:
    """Return `shard-000012.tar` for 12."""
    return f"shard-{number:06d}.tar"


def shard_names(records: Sequence[PartRecord]) -> dict[int, str]:
    """Part number -> shard name; a part with only broken samples gives no shard."""
    whole = [number for number, record in enumerate(records) if record.num_samples]
    if not whole:
        broken = [entry for record in records for entry in record.broken]
        example = printable(": ".join(broken[0]))
        raise UserError(f"None of the {len(broken):,} images can be packed, such as {example}.")
    return {number: shard_name(count) for count, number in enumerate(whole)}


def closing_files(
    samples: Samples, records: Sequence[PartRecord], identity: dict[str, Any]
) -> dict[str, bytes]:
    """Name -> content of the files to write after all shards, in this sequence."""
    files = dict(samples.sidecars())
    broken = [entry for record in records for entry in record.broken]
    if broken:
        lines = [json.dumps({"path": name, "reason": reason}) for name, reason in broken]
        files[BROKEN] = ("\n".join(lines) + "\n").encode()
    shards = [
        {
            "name": name,
            "samples": records[number].num_samples,
            "bytes": records[number].num_bytes,
            "sha256": records[number].sha256,
        }
        for number, name in shard_names(records).items()
    ]
    summary = {"identity": identity, "shards": shards, "num_broken": len(broken)}
    files[SUMMARY] = (json.dumps(summary, indent=2, sort_keys=True) + "\n").encode()
    return files


def check_same(out: object, found: Any, identity: dict[str, Any]) -> None:
    """Raise UserError if `out` holds a pack of something else than `identity`; None: no pack."""
    if found not in (None, identity):
        raise UserError(
            f"{out} already holds a pack of another source or with other settings:\n"
            f"  there: {json.dumps(found, sort_keys=True)}\n"
            f"  asked: {json.dumps(identity, sort_keys=True)}\n"
            "Name another directory, or remove this one."
        )


def foreign_shards(out: object, example: str) -> UserError:
    """The error for a directory with shards that no pack of ours wrote."""
    return UserError(
        f"{out} already holds shards that this pack did not write, such as {example}: name another "
        "directory."
    )
