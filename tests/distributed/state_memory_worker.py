"""What each process holds for the parameters: bytes of all tensors, gradients included.

in_turn.py hold CONFIG OUT.json [a.b=c ...]
"""

import gc
import json
import warnings
from pathlib import Path

import torch

from pipeline.common import strict
from pipeline.config import TrainConfig
from pipeline.distributed.runtime import Runtime
from pipeline.training.build import make_forward, make_strategy, warm_up_loss

MIN_BYTES = 1 << 16  # of a storage that is counted: activations and counters are smaller


def held() -> int:
    """Bytes of all tensors of this process, each storage once."""
    gc.collect()
    sizes: dict[int, int] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some libraries' lazy objects warn when they are looked at
        for found in gc.get_objects():
            if type(found) in (torch.Tensor, torch.nn.Parameter):
                for tensor in (found, found.grad if found.is_leaf else None):
                    if tensor is not None:
                        storage = tensor.untyped_storage()
                        sizes[storage.data_ptr()] = storage.nbytes()
    return sum(size for size in sizes.values() if size >= MIN_BYTES)


def main(config_path: str, out: str, *overrides: str) -> int:
    """Take two updates and write down what was held."""
    config = strict.load(TrainConfig, Path(config_path), overrides)
    runtime = Runtime.start(accumulation=config.accumulation)
    before = held()
    forward = make_forward(config, runtime.device)
    strategy = make_strategy(config, runtime)
    strategy.warm_up(warm_up_loss(config, forward, strategy, runtime))
    with_gradients = 0
    for _ in range(2):
        strategy.set_learning_rates(config.learning_rates_at(0))
        with strategy.accumulate(is_last=True):
            strategy.backward(warm_up_loss(config, forward, strategy, runtime))
        with_gradients = held() - before
        strategy.step()
    state = strategy.full_state()
    num_parameters = sum(value.numel() for value in state.exp_avg.values())
    found = {"held": with_gradients, "parameters": num_parameters}
    if runtime.is_main:
        Path(out).write_text(json.dumps(found))
    return 0
