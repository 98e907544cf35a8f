"""Doubly reparameterised gradients: the noise that log q carries into the weights, turned into a pathwise term."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import Delta, Distribution, ExpandedDistribution, TransformedDistribution
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import TransformedDistribution as TorchTransformedDistribution

from scorefn.core import SupportError, check_support
from scorefn.posteriors.traces import Site, Trace


class DoublyReparameterized:
    """Square the normalised weights on the path of reparameterised sites, and drop the score inside them.

    In ``sum_n r_n grad log w_n`` the term ``-r_n grad log q(z_n)``, taken at a fixed z_n, is a score function with a
    signal that does not shrink as N grows. As ``d r_n / d log w_n = r_n - r_n^2``, its expectation is a pathwise one,
    and altogether::

        grad over q = E[ sum_n r_n^2 (d log w_n / d z_n) grad z_n ]

    (for one particle: "sticking the landing"). Later sites that are not reparameterised and read z_n keep their score
    functions, with signal ``L - r_n``. The model's parameters, and whatever does not come through such a site, keep
    r_n. Sites whose identity does not hold keep the ordinary gradient: masked ones, ``Delta``, rejection
    samplers, supports that move with a parameter, and chains of transforms (whose densities may have no inverse).

    Source: Tucker, Lawson, Gu & Maddison (2019), "Doubly reparameterized gradient estimators for Monte Carlo
    objectives", eq. 8; Roeder, Wu & Duvenaud (2017), "Sticking the landing", for one particle.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> from scorefn.posteriors import VIMCO, DoublyReparameterized
        >>> def model():
        ...     pyro.sample("z", dist.Normal(0.0, 1.0))
        >>> def guide():  # the posterior itself: the best gradient has no noise left
        ...     pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))
        >>> def gradient(pathwise):
        ...     pyro.clear_param_store()
        ...     pyro.set_rng_seed(0)
        ...     _ = VIMCO(4, pathwise=pathwise).loss_and_grads(model, guide)
        ...     return abs(pyro.param("loc").grad.item())
        >>> gradient(DoublyReparameterized()) < 1e-6 < 0.1 < gradient(None)
        True
    """

    def __repr__(self) -> str:
        """As it is written."""
        return "DoublyReparameterized()"

    def handler(self) -> Split:
        """What cuts each site of the guide, before it is traced."""
        return Split()

    def paths(self, guide_trace: Trace) -> dict[str, Tensor]:
        """What was cut off: the differentiable value of each site, in program order."""
        return {name: site[PATH] for name, site in guide_trace.nodes.items() if PATH in site}

    def term(self, objective: Tensor, guide_trace: Trace) -> Tensor | float:
        """A scalar of value 0 that carries the objective's gradient in the sites' values back to their parameters.

        The trace holds leaves in place of the values, so that no density reaches a parameter through them. Between
        sites the chain rule is applied here, from the last site to the first.
        """
        paths = self.paths(guide_trace)
        if not paths or not objective.requires_grad:
            return 0.0
        leaves = [guide_trace.nodes[name]["value"] for name in paths]
        found = torch.autograd.grad(objective, leaves, retain_graph=True, allow_unused=True)
        slopes: list[Tensor | None] = list(found)
        term: Tensor | float = 0.0
        for index, path in reversed(list(enumerate(paths.values()))):
            if (slope := slopes[index]) is None:
                continue
            if index:
                earlier = torch.autograd.grad(path, leaves[:index], slope, retain_graph=True, allow_unused=True)
                slopes[:index] = [_sum(*pair) for pair in zip(slopes, earlier, strict=False)]
            term = term + (slope * (path - path.detach())).sum()
        return term


PATH = "scorefn_path"  # in a site of the guide's trace: the value that still knows its parameters


class Split(Messenger):  # type: ignore[misc]
    """Gives the program a leaf with the value of each reparameterised draw, and keeps the draw in the site."""

    def _pyro_sample(self, msg: Site) -> None:
        self.drawn_here = not (msg["done"] or msg["is_observed"])

    def _pyro_post_sample(self, msg: Site) -> None:
        value = msg["value"]
        if self.drawn_here and isinstance(value, Tensor) and value.requires_grad and _allows(msg):
            msg[PATH] = value
            msg["value"] = value.detach().requires_grad_()


def _allows(site: Site) -> bool:
    """Whether the expected score of the site's log q, times anything, is a pathwise derivative."""
    fn: Any = site["fn"]
    if not fn.has_rsample or site["mask"] is not None:
        return False
    try:
        check_support(fn)
    except SupportError:
        return False
    while fn is not None:
        chain = type(fn) in (TransformedDistribution, TorchTransformedDistribution)
        parts = getattr(type(fn), "score_parts", Distribution.score_parts)
        partly = parts is not Distribution.score_parts and not isinstance(fn, ExpandedDistribution)
        if chain or partly or isinstance(fn, Delta):
            return False
        fn = getattr(fn, "base_dist", None)
    return True


def _sum(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None or second is None:
        return first if second is None else second
    return first + second
