"""Evaluation of a model from its folder, without a run: one that was exported, or from elsewhere.

FOLDER -> what it says of its model and input, weights -> the evaluation of `trained`, on given data
"""

import json
import math
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from pydantic import TypeAdapter

from pipeline.common.errors import UserError
from pipeline.config import TrainConfig
from pipeline.data.decode import Decode
from pipeline.data.index import Index
from pipeline.data.settings import DataConfig
from pipeline.distributed.runtime import Runtime
from pipeline.evaluation.card import Card
from pipeline.evaluation.request import EvaluationRequest, on_data, one_data_set
from pipeline.evaluation.trained import AS_TRAINED, measured, open_held_out
from pipeline.losses.objective import Objective
from pipeline.models.autoencoder import AutoEncoder
from pipeline.models.interchange import CONFIG, Description, from_pretrained, read_description
from pipeline.models.interchange.importing import read_foreign_model
from pipeline.models.interchange.weights import autoencoder_folder, is_own_folder
from pipeline.monitoring.bad_samples import Quarantine
from pipeline.training.build import move_model
from pipeline.training.resizing import decode_at, model_at

# Of a process at a time: a model's folder does not say which batch fits into memory.
MAX_BATCH, MAX_BATCH_VALUES = 64, 1 << 22
NO_LOSS = "loss is left out: a model's folder does not say its training's objective"
NO_LIKELIHOOD = "distortion is left out: a model from elsewhere does not say its likelihood"


def evaluate_folder(
    folder: Path,
    *,
    request: EvaluationRequest = AS_TRAINED,
    data: Sequence[str],
    shards: Sequence[str] = (),
    out: Path | None = None,
) -> Card:
    """Evaluate the model of a folder on a data set; figures have the prefix `eval/`.

    folder: of `export-model`, `import-model` or diffusers. data, shards: locations of the index,
    and of the shards if they are not beside it; all samples, unless the request names a split.
    Nothing is corrupted: a folder does not say how its model was trained. Raises UserError for a
    folder without a model, data that cannot be read, a size that the model does not take, or a
    metric that it cannot have.

    out: new or former folder for the card and pictures; None: nothing is written.
    """
    description, model = _read(folder, request)
    if not data:
        raise UserError(
            f"{folder} is a model without a run, which has no data of its own: name the data set "
            "to evaluate it on by --data PATH, the directory or URL that holds its `index/`."
        )
    path, place = one_data_set(data, shards)
    settings = json.dumps(description.decode)
    decode: Decode = TypeAdapter(Decode).validate_json(settings)
    decode = decode_at(request.size, description.model, decode, str(folder))
    model = model_at(model, decode)
    runtime = Runtime.start(accumulation=1)
    batch = min(MAX_BATCH, max(MAX_BATCH_VALUES // math.prod(decode.event_shape), 1))
    config = TrainConfig(
        run_dir=str(folder),  # nothing is written there
        data=DataConfig(path=path, decode=decode),
        model=description.model,
        objective=Objective(regularisers=()),
        batch_size=batch * runtime.world,
        precision=description.precision,
        ema_decay=None,
    )
    config = on_data(request.applied(config, decode), path, place, request.split)
    config.evaluation.check_files()
    index = Index.open(path, remote=config.data.remote)
    held_out = open_held_out(config, [index], runtime, Quarantine(None, config.data, runtime))
    views = {"eval": partial(nullcontext, move_model(model, config, runtime.device))}
    about = {"folder": str(folder), "weights_sha256": {"eval": description.weights_sha256}}
    is_foreign = description.dataset_id is None
    left_out = {"eval/loss": NO_LOSS} | ({"eval/distortion": NO_LIKELIHOOD} if is_foreign else {})
    return measured(
        held_out,
        views,
        None if is_foreign else description.step,
        model=about,
        out=out,
        left_out=left_out,
    )


def _read(folder: Path, request: EvaluationRequest) -> tuple[Description, AutoEncoder]:
    """Return what a folder says of its model, and the model."""
    if is_own_folder(folder):
        return read_description(folder), from_pretrained(folder)
    if (autoencoder_folder(folder) / CONFIG).is_file():
        return read_foreign_model(folder, size=request.size)
    raise UserError(
        f"{folder} is neither a run directory, which has a config.yaml, nor the folder of a model "
        f"of `latentmill export-model`, `latentmill import-model` or diffusers, which has a "
        f"{CONFIG}."
    )
