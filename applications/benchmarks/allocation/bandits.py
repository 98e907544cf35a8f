"""Bandits that share a budget of draws."""

from __future__ import annotations

from statistics import mean
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Categorical

from scorefn.diagnostics import (
    ProblemNoise,
    draws_per_problem,
    expectation_per_problem,
    problem_noise,
)


class Bandits:
    """B bandits with K arms and a softmax policy each; problem b is decided as far as its logits are far apart.

    Args:
        spread: the logits of the bandits have standard deviations from 0 to this; 0: all bandits are alike.
        B: how many bandits.
        K: arms of each.
        seed: of logits and rewards.
    """

    def __init__(self, spread: float, B: int = 64, K: int = 10, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        scale = torch.linspace(0, spread, B, dtype=torch.float64).unsqueeze(-1)
        self.logits = (torch.randn(B, K, generator=generator, dtype=torch.float64) * scale).requires_grad_()
        self.rewards = torch.randn(B, K, generator=generator, dtype=torch.float64)

    @property
    def policy(self) -> Categorical:
        """Batch shape ``[B]``."""
        return Categorical(logits=self.logits)

    def f(self, x: Tensor, problem: Tensor) -> Tensor:
        """The reward of arm x ``[...]`` of these problems."""
        return self.rewards[problem, x]

    def of_all(self, x: Tensor) -> Tensor:
        """Of draws ``[N, B]``."""
        return self.f(x, torch.arange(len(self.logits)))

    def exact_noise(self) -> ProblemNoise:
        """v and w of leave-one-out, by the sum over arms."""
        p = self.policy.probs.detach()
        value = (p * self.rewards).sum(-1, keepdim=True)
        score = 1 - 2 * p + p.square().sum(-1, keepdim=True)  # |e_k - p|^2
        signal = (p * (self.rewards - value)).square().sum(-1)
        v = (p * (self.rewards - value).square() * score).sum(-1) - signal
        w = (p * (self.rewards - value).square()).sum(-1) * (p * score).sum(-1) + signal
        return ProblemNoise(v, w)

    def measured_variance(self, counts: Tensor, repeats: int) -> float:
        """Of ``expectation_per_problem``, over repeats, about the exact gradient."""
        exact = torch.autograd.grad((self.policy.probs * self.rewards).sum(), self.logits)[0]
        total = 0.0
        for _ in range(repeats):
            value = expectation_per_problem(self.policy, self.f, counts).sum()
            total += float((torch.autograd.grad(value, self.logits)[0] - exact).square().sum())
        return total / repeats


def problems(spread: float, repeats: int, each: int = 8) -> dict[str, Any]:
    """Total variances at a budget of so many draws for each problem; the pilots' are means over repeats."""
    bandits = Bandits(spread)
    noise, B = bandits.exact_noise(), len(bandits.logits)
    uniform = torch.full((B,), each)
    best = draws_per_problem(noise.variance, B * each, excess=noise.excess)
    rows: dict[str, Any] = {
        "same for all": _row(noise, uniform, bandits.measured_variance(uniform, repeats)),
        "exact moments": _row(noise, best, bandits.measured_variance(best, repeats)),
    }
    for pilot in (8, 32, 128):
        found = [
            problem_noise(bandits.policy, bandits.of_all, bandits.logits, pilot).draws(B * each)
            for _ in range(max(repeats // 50, 2))
        ]
        variances = [float(noise.at(counts).sum()) for counts in found]
        rows[f"pilot of {pilot}"] = {"exact": mean(variances), "worst": max(variances)}
    base = rows["same for all"]["exact"]
    for row in rows.values():
        row["ratio"] = row["exact"] / base
    return rows


def _row(noise: ProblemNoise, counts: Tensor, measured: float) -> dict[str, Any]:
    least, most = int(counts.min()), int(counts.max())
    return {"exact": float(noise.at(counts).sum()), "measured": measured, "least": least, "most": most}
