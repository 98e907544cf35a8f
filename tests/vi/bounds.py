"""The bound of a Pyro program, by draws."""

import pyro
import torch

import scorefn as sf


def bound_by_draws(net, num_draws, seed):
    """The bound by the Pyro programs, and its standard error."""
    pyro.set_rng_seed(seed)
    loss = sf.posteriors.ScoreFunctionELBO(num_draws, max_plate_nesting=1)
    with torch.no_grad():
        return sf.posteriors.bound(loss.draws(net.model, net.guide).fx.sum(-1))
