"""Numbers in double precision."""

import torch


def doubles(value, *, leaf=False):
    return torch.tensor(value, dtype=torch.float64, requires_grad=leaf)
