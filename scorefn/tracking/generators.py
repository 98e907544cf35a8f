"""The global random generators of torch, numpy and Python: seeded alike, and put back as they were."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch


def seed_generators(seed: int) -> None:
    """Seed the global generators; those that nobody has loaded are left alone."""
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(seed)


@contextmanager
def generators_restored() -> Iterator[None]:
    """The global generators as they were, bit for bit, whatever happened in between."""
    restore: list[Callable[[], object]] = [
        partial(torch.set_rng_state, torch.get_rng_state()),
        partial(random.setstate, random.getstate()),
    ]
    if torch.cuda.is_initialized():
        restore.append(partial(torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all()))
    if (numpy := sys.modules.get("numpy")) is not None:
        restore.append(partial(numpy.random.set_state, numpy.random.get_state()))
    try:
        yield
    finally:
        for function in restore:
            function()
