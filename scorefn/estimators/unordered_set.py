"""A set of different values, weighed by its probability in any order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from math import comb

import torch
from torch import Tensor

from scorefn.core import ScorefnError, check_count
from scorefn.core.representation import representation
from scorefn.estimators.problems import check_batch_ndim
from scorefn.estimators.weighted_support import MAX_OUTCOMES, WeightedSupport
from scorefn.estimators.without_replacement import sample_without_replacement

MAX_SET = 16
"""Values of a set at most: its probability is a sum over 2^k subsets."""


@dataclass(frozen=True)
class UnorderedSet(WeightedSupport):
    """The unordered set estimator: k different values S, drawn without replacement (k = num_samples).

    ``sum_{s in S} p(s) R(S, s) f(s)``, with gradient ``sum_{s in S} R(S, s) grad p(s) (f(s) - b(s))``::

        R(S, s)  = P_{-s}(S - s) / P(S)
        b(s)     = p(s) f(s) + sum_{s' in S, s' != s} p(s') R_s(S, s') f(s')
        R_s(S, s') = P_{-s,-s'}(S - s - s') / P_{-s}(S - s)

    P(S) is the probability that the first k draws without replacement are S, in any order; P_{-s} the same where s was
    taken out of the support before. It is the mean of every estimate from the same set in a random order (Murthy,
    1957), hence of lower variance than each of them. The baseline b(s) is itself an unbiased estimate of E f given
    that s came first, so that the gradient keeps its expectation. P is computed exactly, in log space, by a recursion
    over the 2^k subsets of S. Source: Kool, van Hoof & Welling (2020), "Estimating gradients for discrete random
    variables by sampling without replacement".

    Serves ``Bernoulli``, ``Categorical``, ``OneHotCategorical`` and ``Independent`` of these. The log-probabilities of
    all joint values of a problem are enumerated (at most 2^20), f is evaluated k times. Where the support has k values
    or fewer, f is evaluated at each, and value and gradient are exact.

    Args:
        num_samples: k, at least 2 with the baseline and at most 16.
        baseline: whether b is subtracted; without it f should have mean 0.
        batch_ndim: how many leading batch dimensions of p are problems of their own; the others are drawn jointly,
            with the event. None: all of them where p is an ``Independent``, none otherwise.

    Attributes:
        evaluations: k, at most.

    Raises:
        ScorefnError: num_samples out of range; p is of another family or its support has more than 2^20 joint values.
        ShapeError: f returned values of other problems than batch_ndim says.

    Example:
        >>> import torch
        >>> from scorefn import UnorderedSet
        >>> _ = torch.manual_seed(0)
        >>> logits = torch.zeros(3, requires_grad=True)
        >>> p = torch.distributions.Bernoulli(logits=logits)
        >>> UnorderedSet(4)(p, lambda x: x.sum(-1).square()).backward()
        >>> logits.grad.shape
        torch.Size([3])
    """

    num_samples: int
    baseline: bool = True
    batch_ndim: int | None = None
    unbiased = True

    __repr__ = representation

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        count = check_count("num_samples", self.num_samples)
        if self.baseline and count < 2:
            raise ScorefnError(
                "num_samples=1 leaves no other value for the baseline of UnorderedSet, and with the value itself it "
                "would be biased. Raise num_samples to 2 or more, or use baseline=False."
            )
        if count > MAX_SET:
            raise ScorefnError(
                f"num_samples={count} is more than UnorderedSet takes: the probability of a set is a sum over 2^k "
                f"subsets, and k is {MAX_SET} at most. Average several estimates, or use SumAndSample."
            )
        check_batch_ndim(self.batch_ndim)
        object.__setattr__(self, "num_samples", count)
        object.__setattr__(self, "evaluations", count)

    def _choose(self, log_prob: Tensor) -> Tensor:
        return sample_without_replacement(log_prob, self.num_samples)

    def _outcomes(self, log_prob: Tensor) -> tuple[Tensor, Tensor] | None:
        if comb(len(log_prob), self.num_samples) > MAX_OUTCOMES:
            return None
        sets = torch.combinations(torch.arange(len(log_prob), device=log_prob.device), self.num_samples)
        rest = log_prob.expand(len(sets), -1).scatter(1, sets, -torch.inf).logsumexp(1)
        return sets.T, log_set_probabilities(log_prob[sets.T], rest)[-1].exp()

    def _weigh(self, log_prob: Tensor, number: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor] | None]:
        size = len(number)
        in_set = number.movedim(0, -1)
        rest = log_prob.scatter(-1, in_set, -torch.inf).logsumexp(-1)
        of_set = log_prob.gather(-1, in_set).movedim(-1, 0)
        first = log_set_probabilities(of_set, rest)
        one_out, two_out = _taken_out(size, log_prob.device)
        without = first[one_out]
        weights = (of_set + without - first[-1]).exp()
        if not self.baseline:
            return weights, None
        others = (of_set + first[two_out] - without.unsqueeze(1)).exp()
        return weights, lambda values: (others * values).sum(1)


def log_set_probabilities(of_set: Tensor, rest: Tensor) -> Tensor:
    """Log-probability, for each subset A of k values, that the first |A| draws without replacement are A.

    The support of these draws is A and the rest, so that the other values of the set were taken out before. By the
    value a that is drawn first, ``P(A) = sum_{a in A} p(a) P(A - a) / (p(A) + p(rest))``: sums of positive terms only.

    Args:
        of_set: log-probabilities of the k values, ``[k, *B]``.
        rest: log-probability of all others together, ``[*B]``; -inf where there are none.

    Returns:
        ``[2^k, *B]``, where bit a of the index says whether value a is in A.
    """
    total = rest.unsqueeze(0)
    for log_prob in of_set:
        total = torch.cat((total, torch.logaddexp(total, log_prob)))
    found = torch.zeros_like(total)
    for subsets, members, smaller in _subsets(len(of_set), of_set.device):
        found[subsets] = (of_set[members] + found[smaller]).logsumexp(1) - total[subsets]
    return found


@lru_cache(maxsize=32)
def _taken_out(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The subsets without one value ``[k]`` and without two ``[k, k]``; on the diagonal without one: R_s(S, s) = 1."""
    bit = 2 ** torch.arange(size, device=device)
    return 2**size - 1 - bit, 2**size - 1 - (bit.unsqueeze(1) | bit)


@lru_cache(maxsize=32)
def _subsets(size: int, device: torch.device) -> list[tuple[Tensor, Tensor, Tensor]]:
    """For m = 1 to k: the subsets of m values ``[n]``, their members ``[n, m]``, and the subset without each."""
    levels = []
    for m in range(1, size + 1):
        members = torch.tensor(list(combinations(range(size), m)), device=device)
        bits = 2**members
        subsets = bits.sum(1)
        levels.append((subsets, members, subsets.unsqueeze(1) - bits))
    return levels
