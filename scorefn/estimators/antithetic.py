"""Jointly antithetic draws of discrete sites: DisARM for pairs, ARMS and CARMS for more.

A site is a tree of coins: one for ``Bernoulli``, and for a categorical one a balanced tree whose leaves are its values.
The n draws of a block come down the tree together. Where r of them meet at a coin that is 1 with probability p, the
number of ones is ``floor(rp)`` or ``ceil(rp)``, with mean rp, and chance says which draws they are. So each draw
follows the distribution exactly, coins of different nodes and sites are independent, and the correlation at each coin
is the least that exchangeable draws can have::

    rho(p, r) = (E[k (k - 1)] / (r (r - 1)) - p^2) / (p (1 - p)),   k the number of ones;   -m / (1 - m) where r m <= 1

with ``m = min(p, 1 - p)``. For the coins of two different draws, ``E[b_j - p | b_i] = rho (b_i - p)``, whence the
leave-one-out estimate of the derivative in a coin's logit is ``1 - rho`` times the truth where two draws meet, and
right where only one of them comes by. A pair that parts at a node meets there and at the nodes above, where its coins
are equal and its term is 0. Hence, with v(i, j) the node where two draws part and l its logit::

    1 / (n (n - 1)) sum_{i<j} (f_i - f_j) grad [log p(x_i) - log p(x_j) + rho / (1 - rho) (l if x_i took 1 else -l)]

which is leave-one-out and a correction at the node of parting. ``rho / (1 - rho)`` lies in [-1/r, 0], also as p goes
to 0 or 1.
"""

from __future__ import annotations

from math import comb

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Distribution
from torch.nn.functional import one_hot

from scorefn.core import ScorefnError, check_count
from scorefn.estimators.estimator import Estimator, check_shape
from scorefn.estimators.finite import points, unwrapped
from scorefn.estimators.gradient import beside, with_gradient
from scorefn.estimators.noise import uniform

MAX_OUTCOMES = 2**17
"""Tuples of coins that are listed at most."""


class _Antithetic(Estimator):
    """The mean over independent blocks of jointly antithetic draws."""

    unbiased = True
    evaluations: int

    def __init__(self, blocks: int, size: int):
        self._blocks, self._size = blocks, size
        self.evaluations = blocks * size

    def sample(self, p: Distribution) -> Tensor:
        """The draws ``[M, *batch, *event]``, those of one block after each other."""
        unit = unwrapped(p, type(self).__name__)
        with torch.no_grad():
            logits: Tensor = unit.logits
            if isinstance(unit, Bernoulli):
                return _coins(logits, self._blocks, self._size).flatten(0, 1).to(logits.dtype)
            counts = _leaves(_masses(logits), self._blocks, self._size)
            rank = _ranks((self._blocks, *logits.shape[:-1], self._size), logits)
            index = torch.searchsorted(counts.cumsum(-1), rank, right=True)
            return points(unit, index.movedim(-1, 1).flatten(0, 1))

    def outcomes(self, p: Distribution) -> tuple[Tensor, Tensor] | None:
        """All tuples of coins ``[M, T, *batch, *event]`` and their probabilities; None for trees and for many coins."""
        unit = unwrapped(p, type(self).__name__)
        coins = unit.batch_shape.numel()
        if not isinstance(unit, Bernoulli) or 2 ** (self.evaluations * coins) > MAX_OUTCOMES:
            return None
        bits = torch.arange(2 ** (self.evaluations * coins), device=unit.logits.device).unsqueeze(-1)
        bits = bits >> torch.arange(self.evaluations * coins, device=bits.device) & 1
        x = bits.unflatten(1, (self._blocks, self._size, coins))
        ones = x.sum(2)
        with torch.no_grad():
            mean = self._size * unit.logits.double().sigmoid().flatten()
        subsets = torch.tensor([comb(self._size, k) for k in range(self._size + 1)], device=bits.device)
        probability = ((1 - (ones - mean).abs()).clamp(min=0) / subsets[ones]).flatten(1).prod(1)  # floor or ceiling
        x, probability = x[probability > 0], probability[probability > 0]
        return x.flatten(1, 2).movedim(0, 1).reshape(-1, len(x), *unit.batch_shape).to(unit.logits.dtype), probability

    def surrogate(self, p: Distribution, x: Tensor, fx: Tensor) -> Tensor:
        """The mean of fx, ``[*B]``, with the gradient of the class; x and fx are ``[M, ...]``, block after block."""
        unit = unwrapped(p, type(self).__name__)
        check_shape(fx, (self.evaluations, *p.batch_shape))
        value = fx.mean(0)
        if not torch.is_grad_enabled():
            return value
        logits: Tensor = unit.logits
        with torch.no_grad():
            centred = fx - value
            if self._blocks > 1:
                blocks = fx.unflatten(0, (self._blocks, self._size))
                centred = (blocks - blocks.mean(1, keepdim=True)).flatten(0, 1)
            advantage = centred / (self._blocks * (self._size - 1))
            if isinstance(unit, Bernoulli):
                score = x if self._size == 2 else x - unit.probs  # the advantages of a pair sum to 0 exactly
                gradient = (beside(advantage, x) * score).sum(0) * _magnification(logits, self._size)
            else:
                taken = x if x.is_floating_point() else one_hot(x, logits.shape[-1]).to(logits.dtype)
                gradient = self._tree_gradient(logits, taken, beside(advantage, taken))
        return with_gradient(value, logits, gradient)

    def _tree_gradient(self, logits: Tensor, taken: Tensor, advantage: Tensor) -> Tensor:
        """The gradient in the log-probabilities ``[*batch, *sites, C]``; its sum over C is 0."""
        blocks = (self._blocks, self._size)
        count = taken.unflatten(0, blocks).sum(1)  # draws of each block at each leaf, and their advantage
        charge = (taken * advantage).unflatten(0, blocks).sum(1)
        masses = _masses(logits)
        levels = []
        for mass in masses[:-1]:  # up: what is lost where draws part, per node
            logit = _logits(mass)
            (left, right), (f_left, f_right) = _pairs(count), _pairs(charge)
            excess = _magnification(logit, left + right) - 1
            levels.append((logit, ((right * f_left - left * f_right) * excess).sum(0) / self._size))
            count, charge = _joined(count), _joined(charge)
        gradient = torch.zeros_like(masses[-1])
        for logit, loss in reversed(levels):  # down: d log P(node) / d log P(child) is the child's share
            pairs = logit.shape[-1]
            above = gradient[..., :pairs]
            share = logit.sigmoid()
            children = torch.stack((above * share + loss, above * (1 - share) - loss), -1).flatten(-2)
            gradient = torch.cat((children, gradient[..., pairs:]), -1)
        return (taken * advantage).sum(0) + gradient


class DisARM(_Antithetic):
    """Antithetic pairs whose gradient is corrected for their correlation: ``Bernoulli`` and categorical sites.

    For a Bernoulli logit, with the pair ``b = 1[u < p]``, ``b' = 1[1 - u < p]``::

        1/2 (f(b) - f(b')) (b - b') max(p, 1 - p)

    and the mean over the pairs. A site with C values is a balanced tree of C - 1 coins; the coins of a node that only
    one draw of a pair reaches are integrated out. At equal cost its variance is at most that of leave-one-out in one
    site, and 0 at p = 1/2; the gain vanishes as p goes to 0 or 1.

    Serves ``Bernoulli``, ``Categorical``, ``OneHotCategorical`` and ``Independent`` of these; f is a black box.
    Sources: Dong, Mnih & Tucker (2020), "DisARM: an antithetic gradient estimator for binary latent variables"
    (the same as U2G of Yin, Ho, Yan, Qian & Zhou, 2020); Dong, Mnih & Tucker (2021), "Coupled gradient estimators for
    discrete latent variables", for the trees.

    Args:
        num_pairs: independent pairs; f is evaluated ``2 num_pairs`` times.

    Raises:
        ScorefnError: num_pairs is no integer of at least 1, or the distribution is of another family.
        ShapeError: fx is not ``[M, *B]``.

    Example:
        >>> import torch
        >>> from scorefn import DisARM
        >>> logits = torch.zeros(3, requires_grad=True)
        >>> loss = DisARM()(torch.distributions.Bernoulli(logits=logits), lambda x: x.sum(-1))
        >>> loss.item()
        1.5
        >>> loss.backward()
    """

    def __init__(self, num_pairs: int = 1):
        super().__init__(check_count("num_pairs", num_pairs), 2)

    def __repr__(self) -> str:
        return f"DisARM(num_pairs={self._blocks})"


class ARMS(_Antithetic):
    """n jointly antithetic draws; DisARM at n = 2; for categorical sites CARMS.

    For a Bernoulli logit, with the pairwise correlation rho of its n draws::

        1 / (n - 1) sum_i (f_i - mean f) (b_i - p) / (1 - rho)

    The estimate is the paper's; its draws come from a Dirichlet copula, these from one with the least correlation that
    exchangeable draws can have (the number of ones is ``floor(np)`` or ``ceil(np)``), for which rho has a closed form
    and ``1 / (1 - rho)`` lies in [1 - 1/n, 1]. In one site the variance is 0 where np is an integer. A site with C
    values is a balanced tree of such coins.

    Serves ``Bernoulli``, ``Categorical``, ``OneHotCategorical`` and ``Independent`` of these; f is a black box.
    Sources: Dimitriev & Zhou (2021), "ARMS: antithetic-REINFORCE-multi-sample gradient for binary variables", and
    "CARMS: categorical-antithetic-REINFORCE multi-sample gradient estimator".

    Args:
        num_samples: n, the draws and evaluations of f, at least 2.

    Raises:
        ScorefnError: num_samples is no integer of at least 2, or the distribution is of another family.
        ShapeError: fx is not ``[M, *B]``.

    Example:
        >>> import torch
        >>> from scorefn import ARMS
        >>> logits = torch.zeros(3, requires_grad=True)
        >>> loss = ARMS(4)(torch.distributions.Bernoulli(logits=logits), lambda x: x.sum(-1))
        >>> loss.item()
        1.5
        >>> loss.backward()
    """

    def __init__(self, num_samples: int):
        if check_count("num_samples", num_samples) < 2:
            raise ScorefnError(
                "num_samples=1 leaves nothing to compare a draw with: ARMS needs 2 or more. Use "
                "scorefn.expectation(p, f, 1) for a single draw."
            )
        super().__init__(1, check_count("num_samples", num_samples))

    def __repr__(self) -> str:
        return f"ARMS({self._size})"


# -------------------------------------------------------------------------------------------------------- one coin


def _coins(logits: Tensor, blocks: int, size: int) -> Tensor:
    """``[blocks, size, *sites]`` bool: in each block and site, a random choice of ``_ones`` of the draws."""
    u = uniform((blocks, *logits.shape), logits)
    if size == 2:  # the same law from one uniform
        return torch.stack((u, 1 - u), 1) < logits.sigmoid()
    ranks = _ranks((*u.shape, size), logits)
    return (ranks < _ones(logits, size, u).unsqueeze(-1)).movedim(-1, 1)


def _ones(logit: Tensor, count: Tensor | int, u: Tensor) -> Tensor:
    """How many of ``count`` draws show a 1: the floor or the ceiling of the mean, in proportion."""
    return (count * logit.sigmoid() - u).ceil()


def _magnification(logit: Tensor, count: Tensor | int) -> Tensor:
    """``1 / (1 - rho)``, which is ``p (1 - p) r (r - 1) / E[k (r - k)]``; max(p, 1 - p) where one value is rare."""
    major = logit.abs().sigmoid()
    if isinstance(count, int) and count == 2:
        return major
    minor = 1 - major  # its digits are lost only where it is not used
    mean = count * minor
    whole = mean.floor()
    split = whole * (count - whole) + (mean - whole) * (count - 1 - 2 * whole)  # E[k (r - k)]
    return torch.where(whole == 0, major, minor * major * (count * (count - 1)) / split)


def _ranks(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """A random permutation along the last axis."""
    return uniform(shape, like).argsort(-1)


# ------------------------------------------------------------------------------------------------- a tree of coins


def _masses(log_probs: Tensor) -> list[Tensor]:
    """The log-mass of each node, level by level from the leaves ``[*sites, C]`` to the root ``[*sites, 1]``.

    Neighbours are joined; one that is left over goes up as it is, to the end of the next level.
    """
    levels = [log_probs.clamp(min=torch.finfo(log_probs.dtype).min / 4)]  # impossible values, without infinities
    while levels[-1].shape[-1] > 1:
        left, right = _pairs(levels[-1])
        levels.append(torch.cat((torch.logaddexp(left, right), _odd(levels[-1])), -1))
    return levels


def _pairs(level: Tensor) -> tuple[Tensor, Tensor]:
    """The left and the right children of a level."""
    even = level.shape[-1] // 2 * 2
    return level[..., 0:even:2], level[..., 1:even:2]


def _odd(level: Tensor) -> Tensor:
    """The node that is left over, or nothing."""
    return level[..., level.shape[-1] // 2 * 2 :]


def _joined(level: Tensor) -> Tensor:
    """The sums of the children, one level up."""
    left, right = _pairs(level)
    return torch.cat((left + right, _odd(level)), -1)


def _logits(level: Tensor) -> Tensor:
    """The logit of each coin that decides between two nodes of a level: 1 is the left one."""
    left, right = _pairs(level)
    return left - right


def _leaves(masses: list[Tensor], blocks: int, size: int) -> Tensor:
    """How many draws of each block take each value, ``[blocks, *sites, C]``."""
    root = masses[-1]
    count = torch.full((blocks, *root.shape), float(size), dtype=root.dtype, device=root.device)
    for mass in reversed(masses[:-1]):
        logit = _logits(mass)
        here = count[..., : logit.shape[-1]]
        left = _ones(logit, here, uniform(tuple(here.shape), here))
        count = torch.cat((torch.stack((left, here - left), -1).flatten(-2), count[..., logit.shape[-1] :]), -1)
    return count
