"""Probabilities of the values of a finite support, from the parameters that p was given rather than from log_prob.

torch keeps the probabilities in ``log_prob`` away from 0 and 1, by the precision of their type. Where they are 0 or 1
that costs the value next to nothing and the gradient everything: the clamp has slope 0, while ``d p(1) / d probs = 1``.
"""

from __future__ import annotations

from functools import reduce
from operator import mul
from typing import Any

import torch
from torch import Tensor
from torch.distributions import (
    Bernoulli,
    Binomial,
    Categorical,
    Distribution,
    Independent,
    MixtureSameFamily,
    OneHotCategorical,
)

from scorefn.core import in_transform, nearest

_FAMILIES = (Bernoulli, Binomial, Categorical, Independent, MixtureSameFamily, OneHotCategorical)


def probabilities(p: Any, x: Any) -> Tensor | None:
    """p(x), ``[S, *batch]``, with its slope also where it is 0 or 1; None: ``p.log_prob(x).exp()`` has it.

    Args:
        p: any measure; known are families that were given ``probs``, ``Bernoulli`` of infinite logits, and what is
            made of these.
        x: values of the support, ``[S, *batch, *event]``.
    """
    family, override = nearest(type(p), _FAMILIES, ("log_prob",))
    if family is None or override:
        return None
    if family is Independent:
        inner = probabilities(p.base_dist, x)
        return None if inner is None else product(inner, inner.ndim - p.reinterpreted_batch_ndims)
    if family is MixtureSameFamily:
        return _of_mixture(p, x)
    if family is OneHotCategorical:
        return probabilities(p._categorical, x.argmax(-1))
    if not _given_probs(p):
        infinite = family is Bernoulli and not in_transform() and bool(p.logits.isinf().any())  # log_prob is NaN there
        return torch.where(x == 1, p.logits.sigmoid(), (-p.logits).sigmoid()) if infinite else None
    if family is Bernoulli:
        return torch.where(x == 1, p.probs, 1 - p.probs)
    if family is Binomial:
        n = p.total_count
        ways = torch.lgamma(n + 1) - torch.lgamma(x + 1) - torch.lgamma(n - x + 1)
        found: Tensor = ways.exp() * _power(p.probs, x) * _power(1 - p.probs, n - x)
        return found
    index, probs = torch.broadcast_tensors(x.long().unsqueeze(-1), p.probs)
    chosen: Tensor = probs.gather(-1, index[..., :1]).squeeze(-1)
    return chosen


def product(factors: Tensor, kept: int) -> Tensor:
    """The product over all axes after the first ``kept``; one factor at a time, so that one that is 0 has its slope."""
    return factors if factors.ndim <= kept else reduce(mul, factors.flatten(kept).unbind(-1))


def joint_probability(p: Any, x: Any, log_prob: Tensor, kept: int) -> Tensor:
    """p(x), multiplied over all but the first ``kept`` axes of ``[S, *batch]``."""
    direct = probabilities(p, x)
    if direct is not None:
        return product(direct, kept)
    return (log_prob.flatten(kept).sum(-1) if log_prob.ndim > kept else log_prob).exp()


def _of_mixture(p: MixtureSameFamily, x: Tensor) -> Tensor | None:
    mixture, part = p.mixture_distribution, p.component_distribution
    padded = x.unsqueeze(-1 - len(p.event_shape))
    inner = probabilities(part, padded)
    if inner is None and not _given_probs(mixture):
        return None
    return (mixture.probs * (part.log_prob(padded).exp() if inner is None else inner)).sum(-1)


def _given_probs(p: Distribution) -> bool:
    """Whether probs are what p was made from, and not computed from its logits."""
    return vars(p).get("probs") is not None and vars(p).get("_param") is vars(p)["probs"]


def _power(base: Tensor, exponent: Tensor) -> Tensor:
    """``base ** exponent`` for whole exponents, with two derivatives where the base is 0."""
    return torch.where(exponent == 0, 1.0, base ** exponent.clamp(min=1))
