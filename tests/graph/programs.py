"""Small programs."""

import torch
from torch.distributions import Bernoulli


def logits(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def two_sites(g, a, b, **site):
    z = g.sample("z", Bernoulli(logits=a), **site)
    h = g.sample("h", Bernoulli(logits=b * z))
    g.cost("first", z.sum(-1))
    g.cost("second", (h - 0.3).square().sum(-1))


# ------------------------------------------------------------------------------------------- what is kept between runs


def counting(monkeypatch):
    from scorefn.graph import dependencies

    entered, plain = [], dependencies.Tracked.open
    monkeypatch.setattr(dependencies.Tracked, "open", lambda self: (entered.append(1), plain(self))[1])
    return entered
