"""The token task: vocabulary 2 + end, up to 3 tokens, 15 sequences, a random table policy, a binary reward."""

from itertools import product

import torch

import scorefn as sf
from tests.oracles.toys import coordinates

END = 2
WRITTEN = [(END,), *[(a, END) for a in (0, 1)], *[(a, b, END) for a, b in product((0, 1), repeat=2)]]
WRITTEN += list(product((0, 1), repeat=3))  # cut off at three tokens
CONTEXTS = [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (1, 1)]

tokens = torch.tensor([[*path, *[0] * (3 - len(path))] for path in WRITTEN])
mask = torch.tensor([[t < len(path) for t in range(3)] for path in WRITTEN])
context = torch.tensor([[CONTEXTS.index(path[:t]) if t < len(path) else 0 for t in range(3)] for path in WRITTEN])


def doubles(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def policy(seed=0):
    """Logits `[7 contexts, 3 tokens]`."""
    return doubles(7, 3, seed=seed).requires_grad_()


def log_prob(theta):
    """Of each token of each sequence, `[15, 3]`, 0 where there is none."""
    return torch.where(mask, theta.log_softmax(-1)[context, tokens], 0.0)


def probability(theta):
    """`[15]`."""
    return log_prob(theta).sum(-1).exp()


def binary_reward(seed=4):
    """`[15]`, 0 or 1."""
    return (doubles(15, seed=seed) > 0).double()


def gradient(value, theta):
    """Of a scalar, as one vector."""
    return torch.autograd.grad(value, theta, retain_graph=True)[0].flatten()


def tuples(theta, reward, K, *, behaviour=None):
    """Every K-tuple of sequences as draws `[K, T, 3]` of T problems, and the probability of each tuple `[T]`."""
    choice = coordinates(*[15] * K).T
    origin = theta if behaviour is None else behaviour
    draws = sf.Draws(
        None, log_prob(theta)[choice], reward[choice].unsqueeze(-1), mask=mask[choice],
        behaviour_log_prob=None if behaviour is None else log_prob(behaviour).detach()[choice],
    )  # fmt: skip
    return draws, probability(origin).detach()[choice].prod(0)


def cosine(a, b):
    return float(torch.nn.functional.cosine_similarity(a, b, dim=0))


def best_scale(estimate, truth):
    """The scale that brings truth nearest to the estimate, and how far that still is, relative to the estimate."""
    scale = float(estimate @ truth / (truth @ truth))
    return scale, float((estimate - scale * truth).norm() / (scale * truth).norm())
