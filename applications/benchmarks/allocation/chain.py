"""A chain of three sites whose draws cost differently."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Bernoulli

import scorefn as sf
from scorefn.diagnostics import (
    NestedAllocation,
    nested_variances,
    value_gradients,
)


class Chain:
    """z -> h -> y, three bits each; the cost is the distance of y from a target, weighted by the bits of z.

    Args:
        seed: of the parameters.
    """

    costs = (20.0, 4.0, 1.0)

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        shapes: list[tuple[int, ...]] = [(3,), (3, 3), (3, 3)]
        self.params = [torch.randn(q, generator=generator, dtype=torch.float64).requires_grad_() for q in shapes]
        states = torch.arange(8).unsqueeze(-1).bitwise_and(torch.tensor([1, 2, 4])).ne(0).double()
        self.states = [states[i] for i in torch.meshgrid(*[torch.arange(8)] * 3, indexing="ij")]
        value, log_probs = self.cost(self.states[0], self.states[2]), self.log_probs(*self.states)
        first, second, third = (part.detach().exp() for part in log_probs)
        self.weights = first[:, 0, 0], second[:, :, 0], third  # of z; of h given z; of y given h
        self.mean = self.exact_mean().item()
        self.gradients = value_gradients((value - self.mean) * sum(log_probs), self.params)  # [8, 8, 8, P]

    def log_probs(self, z: Tensor, h: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of z, of h given z, and of y given h."""
        a, b, c = (Bernoulli(logits=logits) for logits in self.logits(z, h))
        return a.log_prob(z).sum(-1), b.log_prob(h).sum(-1), c.log_prob(y).sum(-1)

    def logits(self, z: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of the three sites."""
        a, b, c = self.params
        return a, (2 * z - 1) @ b, (2 * h - 1) @ c

    def cost(self, z: Tensor, y: Tensor) -> Tensor:
        """``[...]``."""
        return ((y - 0.45).square() * (1 + z)).sum(-1)

    def exact_mean(self) -> Tensor:
        """Of the cost, differentiable."""
        z, h, y = self.states
        return (sum(self.log_probs(z, h, y), torch.zeros(())).exp() * self.cost(z, y)).sum()

    def exact_variances(self) -> tuple[float, float, float]:
        """V_1, V_2, V_3 of the gradient with the exact mean as baseline."""
        first, second, third = self.weights
        given_h = (third.unsqueeze(-1) * self.gradients).sum(2)
        given_z = (second.unsqueeze(-1) * given_h).sum(1)
        mean = (first.unsqueeze(-1) * given_z).sum(0)
        inner = (third * (self.gradients - given_h.unsqueeze(2)).square().sum(-1)).sum(2)
        middle = (second * (given_h - given_z.unsqueeze(1)).square().sum(-1)).sum(1)
        outer = (given_z - mean).square().sum(-1)
        return tuple(float((first * v).sum()) for v in (outer, middle, (second * inner).sum(1)))  # type: ignore

    def run(self, counts: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
        """The graph's estimate, and the surrogate of each innermost draw ``[n_1, n_2, n_3]``."""
        z = h = torch.zeros(3, dtype=torch.float64)
        with sf.StochasticGraph(counts[0], baseline=None) as g:
            z = g.sample("z", Bernoulli(logits=self.logits(z, h)[0]))
            h = g.sample("h", Bernoulli(logits=self.logits(z, z)[1]), num_samples=counts[1])
            y = g.sample("y", Bernoulli(logits=self.logits(h, h)[2]), num_samples=counts[2])
            value = self.cost(z[:, None, None], y) - self.mean
            g.cost("cost", value)
        score = g.log_prob("z").sum(-1)[:, None, None] + g.log_prob("h").sum(-1).unsqueeze(-1) + g.log_prob("y").sum(-1)
        return g.surrogate().mean(), value.detach() * score


def sites(repeats: int) -> dict[str, Any]:
    """Price of precision, variance x cost, relative to one nested draw each."""
    chain = Chain()
    plan = NestedAllocation(chain.exact_variances(), chain.costs)
    exact = torch.autograd.grad(chain.exact_mean(), chain.params)
    truth = torch.cat([g.reshape(-1) for g in exact])
    pilots = []
    for _ in range(max(repeats // 50, 2)):
        found = nested_variances(value_gradients(chain.run((32, 3, 2))[1], chain.params))
        pilots.append(NestedAllocation([max(V, 0.0) for V in found], chain.costs).num_samples)
    rows: dict[str, Any] = {}
    named = {"one each": (1, 1), "four and three": (4, 3), "exact components": plan.num_samples}
    for name, nested in named.items():
        counts = (4, *nested)
        deviations = []
        for _ in range(repeats):
            rows_ = value_gradients(chain.run(_distinct(counts))[0], chain.params)
            deviations.append(float((rows_ - truth).square().sum()))
        rows[name] = {
            "draws": list(nested),
            "price": plan.price(nested),
            "exact": plan.variance_at(_distinct(counts)),
            "measured": mean(deviations),
        }
    rows["pilot of 32 x 3 x 2"] = {"price": mean(plan.price(n) for n in pilots), "draws": list(_commonest(pilots))}
    for row in rows.values():
        row["ratio"] = row["price"] / rows["one each"]["price"]
    return {"components": list(plan.variance), "rows": rows}


def _distinct(counts: tuple[int, ...]) -> tuple[int, int, int]:
    """As a graph takes it: an axis may not be as long as the one before."""
    a, b, c = counts
    return (a + 1 if a == b else a), b, c


def _commonest(found: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    return max(set(found), key=list(found).count)
