"""Exact over one site while the others are held, for every site."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Distribution, OneHotCategorical

from scorefn.core import Integrand, ScorefnError, ShapeError, check_count
from scorefn.core.representation import representation
from scorefn.estimators.estimator import Estimator, evaluated
from scorefn.estimators.gradient import first_order
from scorefn.estimators.problems import check_batch_ndim, check_problems
from scorefn.estimators.sites import Sites
from scorefn.estimators.support import MAX_POINTS


@dataclass(frozen=True)
class LocalExpectation(Estimator):
    """IndeCateR: for each of D independent sites the exact sum over its C values, from n base draws x (num_samples).

    With x_{d=c} the base draw x with the value c at site d, the gradient of one base draw is::

        sum_d sum_c grad p_d(c) f(x_{d=c})

    the Rao-Blackwellised score function: no score is left, and no baseline is needed. The value is the mean over sites
    of ``sum_c p_d(c) f(x_{d=c})``, whose variance is no larger than that of f(x). Since the base draw is one of its own
    variants, f is evaluated ``n (1 + D (C - 1))`` times. One site is enumerated exactly. Sources: De Smet, Sansone &
    Zuidberg Dos Martires (2023), "Differentiable sampling of categorical distributions using the CatLog-derivative
    trick" (IndeCateR); Titsias & Lazaro-Gredilla (2015), "Local expectation gradients for black box
    variational inference".

    Serves ``Bernoulli``, ``Categorical``, ``OneHotCategorical`` and ``Independent`` of these.

    Args:
        num_samples: n.
        batch_ndim: how many leading batch dimensions of p are problems of their own; the others are sites of one joint
            draw, with the event. None: all of them where p is an ``Independent``, none otherwise.

    Raises:
        ScorefnError: num_samples is no integer of at least 1; p is of another family; f would be evaluated more than
            2^20 times.
        ShapeError: f returned values of other problems than batch_ndim says.

    Example:
        >>> import torch
        >>> from scorefn import LocalExpectation
        >>> _ = torch.manual_seed(0)
        >>> logits = torch.zeros(5, requires_grad=True)
        >>> p = torch.distributions.Bernoulli(logits=logits)
        >>> LocalExpectation()(p, lambda x: x.sum(-1)).backward()
        >>> logits.grad  # a sum over sites has no variance
        tensor([0.2500, 0.2500, 0.2500, 0.2500, 0.2500])
    """

    num_samples: int = 1
    batch_ndim: int | None = None
    evaluations = None
    unbiased = True

    __repr__ = representation

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        check_batch_ndim(self.batch_ndim)
        object.__setattr__(self, "num_samples", check_count("num_samples", self.num_samples))

    def sample(self, p: Distribution) -> Tensor:
        """The n base draws, then by base draw, site and step its variants, ``[n (1 + D (C - 1)), *batch, *event]``."""
        sites = self._sites(p)
        base = self._draw(sites)
        return self._points(sites, base, self._changed(sites, base))

    def surrogate(self, p: Distribution, x: Tensor, fx: Tensor) -> Tensor:
        """The estimate, ``[*B]``."""
        sites = self._sites(p)
        base = self._base(sites, x)
        return self._estimate(sites, base, self._changed(sites, base), fx)

    def weights(self, p: Distribution, x: Tensor) -> Tensor:
        """``[M, *B]``; they sum to 1."""
        sites = self._sites(p)
        base = self._base(sites, x)
        probability = sites.log_probs.detach().exp() / (self.num_samples * sites.count)
        probability = probability.expand(len(base), *probability.shape).gather(-1, self._changed(sites, base))
        variants = probability.movedim((-2, -1), (1, 2)).flatten(0, 2)
        return torch.cat((1 / self.num_samples - probability.sum((-2, -1)), variants))

    def __call__(self, p: Distribution, f: Integrand) -> Tensor:
        """Sample, call f once on all draws and variants, and return the estimate ``[*B]``."""
        sites = self._sites(p)
        base = self._draw(sites)
        changed = self._changed(sites, base)
        x = self._points(sites, base, changed)
        fx = evaluated(f, x, sites.unit.logits, (len(x), *p.batch_shape))
        return self._estimate(sites, base, changed, fx)

    def _draw(self, sites: Sites) -> Tensor:
        """The values of new base draws, ``[n, *B, D]``, in the dtype of points that are numbers."""
        x = sites.p.sample(torch.Size((self.num_samples,)))
        base = x.argmax(-1) if isinstance(sites.unit, OneHotCategorical) else x
        return base.reshape(-1, *sites.problems, sites.count)

    def _base(self, sites: Sites, x: Tensor) -> Tensor:
        """The values of the base draws among the points, ``[n, *B, D]``."""
        n = self.num_samples
        if len(x) != (wanted := n * (1 + sites.count * (sites.values - 1))):
            raise ShapeError(
                f"x has {len(x)} points, but LocalExpectation(num_samples={n}) makes {wanted} of this "
                f"{type(sites.p).__name__}: pass what sample returned for it, unchanged."
            )
        return sites.index(x[:n])

    def _changed(self, sites: Sites, base: Tensor) -> Tensor:
        """The other values of each site, ``[n, *B, D, C - 1]``."""
        if sites.values == 2:
            return (1 - base).unsqueeze(-1)
        return (base.unsqueeze(-1) + torch.arange(1, sites.values, device=base.device)) % sites.values

    def _points(self, sites: Sites, base: Tensor, changed: Tensor) -> Tensor:
        n, D, steps = self.num_samples, sites.count, sites.values - 1
        index = base.new_empty(n * (1 + D * steps), *base.shape[1:])
        index[:n] = base
        variants = index[n:].view(n, D, steps, *base.shape[1:])
        variants.copy_(base[:, None, None].expand_as(variants))
        variants.diagonal(0, 1, -1).copy_(changed.movedim(-1, 1))  # [n, C - 1, *B, D]: site d of the variants of d
        return sites.points(index)

    def _estimate(self, sites: Sites, base: Tensor, changed: Tensor, fx: Tensor) -> Tensor:
        n, D, steps = self.num_samples, sites.count, sites.values - 1
        check_problems(self, sites.p, n * (1 + D * steps), fx, sites.problems)
        gain = fx[n:].reshape(n, D, steps, *sites.problems) - fx[:n, None, None]  # free of constants in f
        gain = gain.movedim((1, 2), (-2, -1))
        if isinstance(sites.unit, Bernoulli):
            logits = sites.unit.logits.reshape(*sites.problems, D)
            probability = (logits * (1 - 2 * base)).sigmoid().unsqueeze(-1)  # of the other value
        else:  # by value, so that the probabilities need not be copied for each base draw
            gain = gain.new_zeros(*base.shape, sites.values).scatter(-1, changed, gain)
            probability = sites.log_probs.exp()
        change = (probability * gain.detach()).sum((0, -2, -1)) / n
        mean = (probability.detach() * gain).sum((0, -2, -1)) / n if gain.requires_grad else change.detach()
        value: Tensor = fx[:n].mean(0) + mean / D
        return first_order(value + (change - change.detach()))

    def _sites(self, p: Distribution) -> Sites:
        sites = Sites(p, self.batch_ndim, type(self).__name__)
        if (wanted := self.num_samples * (1 + sites.count * (sites.values - 1))) > MAX_POINTS:
            raise ScorefnError(
                f"LocalExpectation would evaluate f at {wanted} points, n (1 + D (C - 1)) for n = {self.num_samples} "
                f"base draws of D = {sites.count} sites with C = {sites.values} values, more than the {MAX_POINTS} "
                "that are allowed. Lower num_samples, or use scorefn.expectation."
            )
        return sites
