"""The last level of `verify`: encodes some tasks again and compares the latents.

manifest's fingerprint, run, data -> the export's config -> Work -> some tasks again -> stored rows

Batches are those of the export, padding included: on the same kind of device the bits are equal, on
another one the values are close.
"""

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from pipeline.checkpoints.folder import list_checkpoints
from pipeline.common import strict
from pipeline.common.errors import UserError
from pipeline.data.storage.opening import open_writable
from pipeline.export.adopt import with_defaults
from pipeline.export.encoders import RunEncoder
from pipeline.export.layout import MANIFEST, ExportDir, data_path
from pipeline.export.manifest import ExportManifest, TaskEntry
from pipeline.export.prepare import prepare
from pipeline.export.run import Work
from pipeline.export.settings import ExportConfig
from pipeline.export.verify.levels import VerifyReport, verify_export
from pipeline.export.work import encode_task
from pipeline.export.workers import Worker
from pipeline.latents.formats.writers import BaseWriter, Rows, Writer
from pipeline.models.interchange import CONFIG
from pipeline.training.loading import load_config

# Largest difference over a field's standard deviation in the task, for kernels of other devices.
TOLERANCES = {"float32": 1e-3, "float16": 3e-3, "bfloat16": 2e-2}
# Parts of the fingerprint that may differ on another machine while the latents agree.
MAY_DIFFER = ("versions", "encode.device")


def verify_with_run(
    out: str, run: str | None, *, source: str | None, shards: str | None, num_tasks: int
) -> VerifyReport:
    """Check an export on all levels; encode randomly chosen tasks again.

    source, shards: directories of index and shards; None: those of the training. Raises UserError
    if run or data cannot be read.
    """
    if run is None:
        raise UserError(
            "The level encode needs the model: give its run directory, or the folder that it was "
            "exported to, by --run."
        )
    report = verify_export(out, source=source, shards=shards)
    if not report.files:
        note = "nothing was encoded anew: the manifest is missing or damaged"
        return replace(report, level="encode", notes=[*report.notes, note])
    problems, notes = _verify_encoding(out, run, source, shards, num_tasks)
    return replace(
        report, level="encode", problems=report.problems + problems, notes=report.notes + notes
    )


def _verify_encoding(
    out: str, run: str, source: str | None, shards: str | None, num_tasks: int
) -> tuple[list[str], list[str]]:
    export = ExportDir(open_writable(out))
    manifest = ExportManifest.parse(export.store.read(MANIFEST) or b"")
    config = config_of(manifest.fingerprint, run, out, source, shards)
    prepared = prepare(config, Worker())
    asked = json.loads(json.dumps(prepared.plan.fingerprint))
    differences = strict.difference(with_defaults(manifest.fingerprint), asked)
    there, here = (part["model"].get("encoder_sha256") for part in (manifest.fingerprint, asked))
    if there is None:  # an export by 93dd2d6: compare the digest of all weights
        ignored = ("model.encoder_sha256",)
    elif there == here:  # the same latents, even if the decoder differs
        ignored = ("model.",)
    else:
        ignored = ("model.weights_sha256",)
    problems = [
        f"{path}: the export has {there!r}, {run} {here!r}"
        for path, there, here in differences
        if not path.startswith((*MAY_DIFFER, *ignored))
    ]
    if problems:
        hints: list[str] = []
        if source is None and any("dataset_id" in problem for problem in problems):
            hints.append("encoded from another data set than the run's: name its index by --source")
        step = manifest.fingerprint["model"]["step"]
        if isinstance(config.encoder, RunEncoder) and config.encoder.step != step:
            hints.append(f"{run} has no checkpoint of step {step}: compared with its newest")
        return problems, hints
    tasks = random.Random().sample(manifest.tasks, min(num_tasks, len(manifest.tasks)))
    check = _Check(export, prepared.work, config, {t.name: t.shard for t in prepared.plan.tasks})
    problems += check.tasks(tasks)
    return problems, [f"{check.num_rows} rows encoded anew, {check.num_same} of them bit for bit"]


def config_of(
    fingerprint: Mapping[str, Any], run: str, out: str, source: str | None, shards: str | None
) -> ExportConfig:
    """Return the config of the export with this fingerprint; `run` may be an exported model."""
    model, data, encode, output = (
        fingerprint[name] for name in ("model", "data", "encode", "output")
    )
    decode = data["decode"]
    is_exported = (Path(run) / CONFIG).is_file()
    encoder = {"kind": "folder"} if is_exported else {"kind": "run", **_checkpoint_of(run, model)}
    values = {
        "model": {**encoder, "path": run},
        "out": out,
        "data": {
            "path": source,
            "shards": shards,
            "split": str(data["split"]).partition("/")[0],
            "label_field": data.get("label_field"),
            "suffixes": decode.get("suffixes") or [decode["suffix"]],
        },
        "size": decode.get("size"),  # of pictures; arrays have none
        "batch_size": encode["batch_size"],
        "precision": encode["precision"],
        "store": output.get("store", "moments" if "logvar" in output["fields"] else "mean"),
        "seed": output.get("seed") or 0,
        "views": output.get("views", ["identity"]),
        "columns": output.get("columns", {}),
        "dtype": output["dtype"],
        "formats": output["formats"],
        "max_bad_fraction": 1,  # how many rows failed was judged by the export
    }
    return ExportConfig.model_validate_json(json.dumps(values))


def _checkpoint_of(run: str, model: Mapping[str, Any]) -> dict[str, Any]:
    """Return the checkpoint that encoded, or the newest where the run has none of that step.

    That may be a later run, which trained a decoder for the same encoder.
    """
    config = load_config(Path(run))
    names = [path.name for path in list_checkpoints(Path(run) / "checkpoints")]
    return {
        "step": model["step"] if f"step-{model['step']}" in names else None,
        "weights": "raw" if config.ema_decay is None else model["weights"],
    }


class _Check:
    """Encodes tasks again and compares them with the stored ones."""

    def __init__(
        self, export: ExportDir, work: Work, config: ExportConfig, shards: Mapping[str, int]
    ) -> None:
        self.num_rows = self.num_same = 0
        self._export, self._work, self._shards = export, work, shards
        self._tolerance = TOLERANCES[config.dtype]
        self._writer: BaseWriter = TypeAdapter(Writer).validate_python(
            config.formats[0].model_dump()
        )

    def tasks(self, tasks: Sequence[TaskEntry]) -> Iterator[str]:
        """Yield the problems of the tasks' stored rows."""
        with closing(self._work.read(self._shards[task.name] for task in tasks)) as shards:
            for task, (_, batches) in zip(tasks, shards, strict=True):
                rows, _ = encode_task(
                    task.name,
                    batches,
                    self._work.encoder,
                    max_bad_fraction=1,
                    on_rows=lambda _: None,
                )
                yield from self._compare(task, rows)

    def _compare(self, task: TaskEntry, rows: Rows) -> Iterator[str]:
        name = task.name
        main = data_path(self._writer.kind, name, self._writer.suffix)
        with self._export.store.local_copy([file.path for file in task.files]) as root:
            try:
                stored = self._writer.read(root / main)
            except ValueError as error:
                yield f"{name}: {error}"
                return
        if list(stored.keys) != list(rows.keys) or not np.array_equal(stored.valid, rows.valid):
            yield f"{name}: its keys, or its rows that cannot be used, differ from the source"
            return
        same = np.ones(len(rows), np.bool_)
        for field, values in rows.latents.items():
            if field not in stored.latents or stored.latents[field].shape != values.shape:
                yield f"{name}: no {field} of the shape {values.shape[1:]}"
                return
            there = stored.latents[field].astype(np.float64).reshape(len(rows), -1)
            here = values.astype(np.float64).reshape(len(rows), -1)
            same &= (there == here).all(axis=1)
            spread = max(float(here[rows.valid].std()) if rows.valid.any() else 0.0, 1e-12)
            difference = float(np.abs(there - here).max(initial=0)) / spread
            if not difference <= self._tolerance:  # also if it is NaN
                yield (
                    f"{name}: {field} is not what the model gives, by up to {difference:.3g} "
                    f"standard deviations (tolerance {self._tolerance})"
                )
        self.num_rows += len(rows)
        self.num_same += int(same.sum())
