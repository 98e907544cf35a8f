"""States of strategies, compared to the bit."""

import torch


def tensors(state):
    """All tensors and numbers of a nested state."""
    if isinstance(state, dict):
        return [leaf for key in sorted(state, key=str) for leaf in tensors(state[key])]
    if isinstance(state, list):
        return [leaf for entry in state for leaf in tensors(entry)]
    return [state]


def same(one, other):
    pairs = list(zip(tensors(one), tensors(other), strict=True))
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)
