"""What every test shares: one thread, a fixed seed, reproducible hypotheses."""

import os
import sys
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

settings.register_profile("scorefn", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("scorefn")
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that the tests start


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same state of torch, whatever ran before it (torch.compile ends validation)."""
    torch.manual_seed(0)
    torch.distributions.Distribution.set_default_validate_args(__debug__)
    if "pyro" in sys.modules:
        sys.modules["pyro"].enable_validation(__debug__)  # a benchmark ends it


@pytest.fixture
def float64() -> Iterator[None]:
    """Double precision as the default dtype, for this test only."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)
