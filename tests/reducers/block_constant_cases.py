"""Two blocks of parameters, and scores one by one."""

import torch
from torch.distributions import Normal

import scorefn as sf
from tests.reducers.doubles import doubles


def two_blocks(n=7):
    generator = torch.Generator().manual_seed(3)
    loc, log_scale = doubles(0.4, leaf=True), doubles(-0.2, leaf=True)
    p = Normal(loc, log_scale.exp())
    x = 0.4 + torch.randn(n, generator=generator, dtype=torch.float64)
    fx = x.pow(3).unsqueeze(-1)
    constants = sf.BlockConstants([loc, log_scale])
    constants.product, constants.square = doubles([[1.5], [-0.5]]), doubles([[2.0], [1.0]])
    return constants, sf.Draws(x, p.log_prob(x).unsqueeze(-1), fx)


def scores(constants, draws):
    """Of each draw, one after the other, in each block; parameters are numbers: `[G, N, K]`."""
    leaf = [block[0] for block in constants.blocks]
    rows = [
        torch.stack(torch.autograd.grad(one, leaf, retain_graph=True, materialize_grads=True))
        for one in draws.log_prob.flatten()
    ]
    return torch.stack(rows, -1).reshape(len(leaf), *draws.log_prob.shape)
