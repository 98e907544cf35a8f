"""Surrogates of every kind, and what is computed from them draw by draw."""

import itertools

import torch
from torch import nn
from torch.distributions import Categorical, Independent, Normal

import scorefn as sf

N, T = 6, 4


def by_hand(surrogate, params, block=None):
    """Gradient of the mean and its variance from one backward pass for each draw."""
    params, draws = list(params), len(surrogate)
    each = []
    for value in surrogate.reshape(draws, -1).sum(1):
        found = torch.autograd.grad(value, params, retain_graph=True, allow_unused=True)
        each.append(
            torch.cat([(torch.zeros_like(q) if g is None else g).flatten() for q, g in zip(params, found, strict=True)])
        )
    each = torch.stack(each)
    labels = list(range(draws)) if block is None else block.tolist()
    mean, M = each.mean(0), len(set(labels))
    residuals = [sum(g - mean for g, b in zip(each, labels, strict=True) if b == label) for label in set(labels)]
    return mean, torch.stack(residuals).square().sum(0) * M / (M - 1) / draws**2


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors])


def charged(log_prob):
    return (log_prob * torch.randn(N, T)).sum(-1)


def network(*sizes, bias=True):
    layers = [m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b, bias=bias), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


def one_decision():
    net = network(3, 5, 2)
    return (Categorical(logits=net(torch.randn(N, 3))).log_prob(torch.ones(N)) * torch.randn(N)), net.parameters()


def steps():
    net = network(3, 5, 2)
    return charged(Categorical(logits=net(torch.randn(N, T, 3))).log_prob(torch.ones(N, T))), net.parameters()


def steps_without_bias():
    net = network(3, 5, 2, bias=False)
    return charged(Categorical(logits=net(torch.randn(N, T, 3))).log_prob(torch.ones(N, T))), net.parameters()


def present_rows_in_any_order():
    net, rows = network(3, 5, 2), torch.randperm(N * T)[:15]
    scored = Categorical(logits=net(torch.randn(15, 3))).log_prob(torch.ones(15))
    return charged(torch.zeros(N * T).index_put((rows,), scored).reshape(N, T)), net.parameters()


def unrolled():
    """The same layers at each step: a recurrent policy."""
    cell, head, state = nn.Linear(5, 2), nn.Linear(2, 2), torch.zeros(N, 2)
    scored = []
    for x in torch.randn(T, N, 3):
        state = cell(torch.cat([x, state], -1)).tanh()
        scored.append(Categorical(logits=head(state)).log_prob(torch.ones(N)))
    return charged(torch.stack(scored, -1)), [*cell.parameters(), *head.parameters()]


FAST = [one_decision, steps, steps_without_bias, present_rows_in_any_order, unrolled]


def gaussian():
    net, log_scale = network(3, 5, 2), torch.zeros(2, requires_grad=True)
    policy = Independent(Normal(net(torch.randn(N, T, 3)), log_scale.exp()), 1)
    return charged(policy.log_prob(torch.randn(N, T, 2))), [*net.parameters(), log_scale]


def rows_of_several_draws():
    """Each row holds two draws."""
    net = network(3, 5, 2)
    return net(torch.randn(N // 2, 3)).sin().flatten() * torch.randn(N), net.parameters()


def normalized_over_draws():
    net = network(3, 5, 2)
    hidden = net[0](torch.randn(N, 3))
    return net[2]((hidden - hidden.mean(0)) / hidden.std(0)).sin().sum(-1), net.parameters()


def tied():
    """One weight in two layers, and elsewhere."""
    layer = nn.Linear(3, 3)
    return layer(layer(torch.randn(N, 3)).tanh()).sin().sum(-1) * layer.weight.sum(), layer.parameters()


def transposed():
    weight = torch.randn(3, 2, requires_grad=True)
    return torch.addmm(torch.zeros(2), torch.randn(N, 3), weight, alpha=2).sin().sum(-1), [weight]


def scaled_addmm():
    layer = nn.Linear(3, 2)
    return torch.addmm(layer.bias, torch.randn(N, 3), layer.weight.T, alpha=2).sin().sum(-1), layer.parameters()


def strided():
    net = network(3, 5, 2)
    return charged(net(torch.randn(T, N, 3).transpose(0, 1)).sin().sum(-1)), net.parameters()


def unused():
    net = network(3, 5, 2)
    return net(torch.randn(N, 3)).sin().sum(-1), [*net.parameters(), torch.ones(2, requires_grad=True)]


def no_network():
    mean = torch.randn(3, requires_grad=True)
    return Normal(mean, 1.0).log_prob(torch.randn(N, 3)), [mean]  # [N, *B]


SLOW = [
    gaussian,
    rows_of_several_draws,
    normalized_over_draws,
    tied,
    transposed,
    scaled_addmm,
    strided,
    unused,
    no_network,
]
BLOCKS = [None, [0, 1, 0, 1, 2, 2], [7, 3, 3, 3, 3, 3], [-1, 4, 4, 9, 8, 9]]
OLD = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
NEW = torch.tensor([0.4, 0.4, 0.2], dtype=torch.float64)


def drawn(old, **fields):
    return sf.Draws(torch.zeros(len(old)), old.clone().requires_grad_(), old.new_zeros(len(old), 1), **fields)
