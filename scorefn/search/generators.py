"""Where the random numbers of a search come from."""

from __future__ import annotations

import operator

import torch

from scorefn.core import ScorefnError


def own_generator(seed: int | torch.Generator | None, device: torch.device) -> torch.Generator:
    """A generator of the strategy's own, on the device of its points."""
    if seed is None or isinstance(seed, torch.Generator):
        where = "cpu" if seed is None else seed.device
        return torch.Generator(device).manual_seed(int(torch.randint(2**62, (), generator=seed, device=where)))
    try:
        if isinstance(seed, bool):
            raise TypeError
        number = operator.index(seed)
    except TypeError as error:
        raise ScorefnError(
            f"seed must be an integer, a torch.Generator or None, but it is {seed!r}: torch draws from nothing else."
        ) from error
    if not -(2**63) <= number < 2**64:
        raise ScorefnError(
            f"seed must fit into 64 bits, but it is {number}: torch has no larger ones. Use seed % 2**64."
        )
    return torch.Generator(device).manual_seed(number)
