"""Which images an evaluation shows: the same at every batch size, and the best and the worst."""

import json
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.common import rng
from pipeline.common.errors import UserError
from pipeline.config import TrainConfig
from pipeline.corruptions import corrupt
from pipeline.data.decode import ImageDecode
from pipeline.data.index import Index, build_index
from pipeline.data.index.splits import SplitSpec
from pipeline.distributed.runtime import Runtime
from pipeline.evaluation.held_out import HeldOut
from pipeline.evaluation.pictures import picture_rows
from pipeline.evaluation.splits import held_out_splits
from pipeline.monitoring.bad_samples import Quarantine
from pipeline.monitoring.sheets import write_sheet
from pipeline.training.build import check_data, make_forward
from tests.evaluation.test_reconstruction import config_of, held_out, model_of
from tests.shards import tiny_image, write_tiny_shards


def test_pictures_are_clean_corrupted_reconstruction_error(tiny_shards, index, runtime):
    config = config_of(tiny_shards, "squared_error", "deterministic")
    model, count = model_of(config), 3
    [grid] = evaluated(config, index, runtime, model, num_images=count).pictures
    assert grid.shape == (count * SIZE, 4 * SIZE, 3)
    assert grid.dtype == np.uint8
    with stream_of(config, index) as stream:
        batch = next(stream)
        numbers, uid = [int(key) for key in batch.keys], batch.uid.clone()
    cells = grid.reshape(count, SIZE, 4, SIZE, 3).transpose(2, 0, 1, 3, 4).astype(int)
    for row in range(count):
        x = torch.from_numpy(tiny_image(numbers[row])).permute(2, 0, 1)[None] / 255
        keys = rng.sample_keys(
            config.seed,
            "evaluation/corruption",
            epoch=torch.zeros(1).long(),
            uid=uid[row : row + 1],
        )
        seen = corrupt(x, config.corruptions, keys).x
        with torch.no_grad():
            mean = config.model.likelihood.mean(model(seen).decoded)
        for column, image in enumerate((x, seen, mean, (x - mean).abs())):
            expected = (image[0].clamp(0, 1) * 255).round().permute(1, 2, 0).numpy()
            assert np.abs(cells[column, row] - expected).max() <= 1
        assert np.array_equal(cells[0, row], tiny_image(numbers[row]))
    assert not evaluated(config, index, runtime, model).pictures
    # A split with fewer samples: all of them.
    [grid] = evaluated(config, index, runtime, model, num_images=1000).pictures
    assert len(grid) == sum(index.counts("held_out")) * SIZE


def test_pictures_show_alpha_as_the_background_and_its_error(runtime):
    del runtime
    clean, mean = torch.zeros(2, 1, 4, 5, 7)
    clean[0, :3], clean[0, 3, :, :4] = 0.4, 1.0  # the right part is clear
    mean[0, :3], mean[0, 3, 1:] = 0.3, 0.5
    decode = ImageDecode(size=[5, 7], channels=4, background=51)
    inputs = Inputs(clean, clean, None, torch.zeros(1).long(), torch.ones(1))
    rows = picture_rows(inputs, mean, 9, decode)
    assert rows is not None
    assert rows.shape == (1, 5, 4 * 7, 3)
    shown, _, found, error = np.split(rows[0], 4, axis=1)
    assert (shown[:, :4] == 102).all()
    assert (shown[:, 4:] == 51).all()
    assert (found[0] == 51).all()
    assert (abs(found[1:].astype(int) - 255 * 0.25) <= 1).all()  # 0.5 * 0.3 + 0.5 * 0.2
    assert (error[0, :4] == 255).all()  # of alpha
    assert (error[1:, :4] == 128).all()
    assert (abs(error[0, 4:].astype(int) - 255 * 0.1) <= 1).all()  # of the colours alone
