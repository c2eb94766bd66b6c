"""The gpu lane runs on any interpreter with torch; skipped tests name what is missing."""

import pytest
import torch


@pytest.fixture
def device() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    return torch.device("cuda")
