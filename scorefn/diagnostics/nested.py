"""Draws per site: nested sites multiply draws; how many of each, from where the noise comes from and what it costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from scorefn.core import NonFiniteError, ScorefnError, ShapeError, check_count
from scorefn.core.representation import representation
from scorefn.diagnostics.allocation import check_gradients


def nested_variances(gradients: Tensor) -> tuple[float, ...]:
    """V_1, ..., V_L: what each of L nested sites contributes to the variance of a gradient, by analysis of variance.

    With n_l draws of site l for each of what it depends on, the mean over all has ::

        variance = V_1/n_1 + V_2/(n_1 n_2) + ... + V_L/(n_1 ... n_L)

    where V_1 is the variance over the first site of the mean given it, and so on down. G_l being the means over all
    inner sites and s_l^2 the sample variance of G_l along axis l, averaged over the outer ones::

        V_L = s_L^2,    V_l = s_l^2 - s_{l+1}^2 / n_{l+1}

    Each is without bias, for terms that are independent given the sites outside of them; by chance all but the last can
    be negative. Leave-one-out ties the terms: subtract a constant, or a baseline that was learnt before, to measure.
    Source: Cochran (1977), "Sampling techniques", 3rd ed., sections 10.3 and 10.8 (subsampling in two and three
    stages).

    Args:
        gradients: ``[n_1, ..., n_L, P]``, of the innermost terms, such as ``value_gradients(surrogate, params)``; all n
            at least 2.

    Raises:
        ScorefnError: gradients that are no tensor of real numbers.
        ShapeError: no axis of draws before that of the coordinates, or one of fewer than two draws. A single axis
            (L = 1) has the plain variance V_1.
        NonFiniteError: a gradient that is NaN or infinite.

    Example:
        >>> import torch, scorefn as sf
        >>> from scorefn.diagnostics import nested_variances
        >>> a, b = torch.zeros((), requires_grad=True), torch.zeros((), requires_grad=True)
        >>> with sf.StochasticGraph(num_samples=64) as g:
        ...     z = g.sample("z", torch.distributions.Bernoulli(logits=a))
        ...     h = g.sample("h", torch.distributions.Bernoulli(logits=b + z), num_samples=4)
        ...     g.cost("c", (h - 0.45).square())
        >>> score = g.log_prob("z").unsqueeze(1) + g.log_prob("h")
        >>> terms = (h - 0.45).square() * score  # [64, 4], one for each h
        >>> len(nested_variances(sf.diagnostics.value_gradients(terms, [a, b])))
        2
    """
    check_gradients(gradients, "[n_1, ..., n_L, P]")
    if gradients.ndim < 2 or min(gradients.shape[:-1]) < 2:
        raise ShapeError(
            f"gradients has shape {tuple(gradients.shape)}, but it must be [n_1, ..., n_L, P] with every n at least 2: "
            "only two draws of a site tell its noise from that of the others."
        )
    if not bool(gradients.isfinite().all()):
        raise NonFiniteError("A gradient is NaN or infinite, so it has no variance. Make the terms finite first.")
    means, found, inner = gradients.detach().double(), list[float](), 0.0
    while means.ndim > 1:
        count = means.shape[-2]
        spread = float(means.var(-2).sum(-1).mean())
        found.append(spread - inner)
        means, inner = means.mean(-2), spread / count
    return tuple(reversed(found))


@dataclass(frozen=True)
class NestedAllocation:
    """Noise and cost of a gradient with nested draws, and the numbers of draws that make the most of both.

    With n_l draws of site l for each draw of site l - 1, and m_l = n_1 ... n_l of them altogether::

        variance = sum_l V_l / m_l,    cost = sum_l c_l m_l

    n_1 divides the one and multiplies the other, so that the product, the price of precision, depends on n_2, ..., n_L
    only. Without rounding it is least at ``n_l = sqrt(V_l c_{l-1} / (V_{l-1} c_l))`` where that is 1 or more (Cochran,
    "Sampling techniques", 3rd ed., sections 10.6 and 10.8; Marcuse, 1949, "Optimum allocation and variance components
    in nested sampling"): ``Allocation`` is the case of two sites, minibatches and particles. n_1 is then what the
    budget, or the precision that is wanted, asks for.

    Args:
        variance: V_1, ..., V_L, see ``nested_variances``; with leave-one-out among nested draws the variance falls
            a little faster where they are few.
        cost: c_1, ..., c_L, of one draw of each site.
        most: a site gets no more draws for each of its parent's: the price can fall for ever, where an outer site has
            no noise or an inner one no cost.

    Raises:
        ScorefnError: no sites, not a cost for each variance, one that is negative or not finite, or no cost at all;
            from ``variance_at``, ``cost_at`` and ``price``, another number of counts, or one below 1.

    Example:
        >>> from scorefn.diagnostics import NestedAllocation
        >>> plan = NestedAllocation(variance=(1.0, 8.0, 4.0), cost=(10.0, 1.0, 0.2))
        >>> plan.num_samples
        (8, 2)
    """

    variance: Sequence[float]
    cost: Sequence[float]
    most: int = 1024

    __repr__ = representation

    def __post_init__(self) -> None:
        """Refuse what is no variance and no cost."""
        for name in ("variance", "cost"):
            values = tuple(getattr(self, name))
            if bad := [x for x in values if not (hasattr(x, "__float__") and math.isfinite(x) and x >= 0)]:
                raise ScorefnError(
                    f"{name} must be finite and not negative, but one is {bad[0]!r}: an estimate that is negative by "
                    "chance is taken for 0."
                )
            object.__setattr__(self, name, tuple(float(x) for x in values))
        if not self.variance or len(self.variance) != len(self.cost):
            raise ScorefnError(
                f"There are {len(self.variance)} variances and {len(self.cost)} costs, but each nested site has one of "
                "both: give V_1, ..., V_L and c_1, ..., c_L."
            )
        if not any(self.cost):
            raise ScorefnError("Draws cost nothing: all of cost is 0. Measure at least one.")
        check_count("most", self.most)

    def variance_at(self, counts: Sequence[float]) -> float:
        """``sum_l V_l / m_l`` with n_1, ..., n_L draws."""
        return sum(V / m for V, m in zip(self.variance, self._products(counts), strict=True))

    def cost_at(self, counts: Sequence[float]) -> float:
        """``sum_l c_l m_l`` with n_1, ..., n_L draws."""
        return sum(c * m for c, m in zip(self.cost, self._products(counts), strict=True))

    def price(self, num_samples: Sequence[float]) -> float:
        """Variance x cost with n_2, ..., n_L draws, whatever n_1 is."""
        return self.variance_at((1, *num_samples)) * self.cost_at((1, *num_samples))

    @property
    def num_samples(self) -> tuple[int, ...]:
        """The integers n_2, ..., n_L, up to ``most``, of the least price; of several such, the fewest draws.

        Found by branch and bound: with A = sum V_j/m_j and D = sum c_j m_j over the sites that have their counts,
        the price is at least ``(sqrt(A D) + sum sqrt(V_j c_j))^2`` over the others.
        """
        L = len(self.variance)
        rest = [sum(math.sqrt(V * c) for V, c in zip(self.variance[k:], self.cost[k:], strict=True)) for k in range(L)]
        rest.append(0.0)
        best: tuple[float, tuple[int, ...]] = (self.price((1,) * (L - 1)), (1,) * (L - 1))

        def search(level: int, product: int, noise: float, spent: float, counts: tuple[int, ...]) -> None:
            nonlocal best
            if level == L:
                if (price := self.price(counts)) < best[0] * (1 - 1e-12) or (
                    price <= best[0] * (1 + 1e-12) and (math.prod(counts), counts) < (math.prod(best[1]), best[1])
                ):
                    best = price, counts
                return
            V, c = self.variance[level], self.cost[level]
            numerator, denominator = V * spent, c * noise * product**2
            middle = math.sqrt(numerator / denominator) if denominator > 0 else math.inf if numerator > 0 else 1.0
            start = min(max(math.floor(min(middle, self.most)), 1), self.most)
            for way in (range(start, 0, -1), range(start + 1, self.most + 1)):  # the bound rises either way
                for n in way:
                    A, D = noise + V / (product * n), spent + c * product * n
                    if (math.sqrt(A * D) + rest[level + 1]) ** 2 > best[0] * (1 + 1e-12):
                        break
                    search(level + 1, product * n, A, D, (*counts, n))

        if any(self.variance):  # else one number is as good as another
            search(1, 1, self.variance[0], self.cost[0], ())
        return best[1]

    def _products(self, counts: Sequence[float]) -> list[float]:
        if len(counts) != len(self.variance):
            raise ScorefnError(
                f"There are {len(counts)} counts for {len(self.variance)} nested sites: one for each is needed."
            )
        if bad := [n for n in counts if not (hasattr(n, "__float__") and math.isfinite(n) and n >= 1)]:
            raise ScorefnError(f"Every number of draws must be finite and at least 1, but one is {bad[0]!r}.")
        products, m = list[float](), 1.0
        for n in counts:
            products.append(m := m * n)
        return products
