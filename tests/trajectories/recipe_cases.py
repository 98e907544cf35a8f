"""The recipes, and batches of sequences to compute them by hand."""

import math

import torch

from scorefn.trajectories import (
    GroupMeanAdvantage,
    GroupStandardizedAdvantage,
    LeaveOneOutAdvantage,
    WhitenedAdvantage,
    dapo,
    dr_grpo,
    grpo,
    reinforce_plus_plus_baseline,
    rloo,
    sequence_draws,
)

RECIPES = {
    "rloo": rloo,
    "reinforce++": reinforce_plus_plus_baseline,
    "grpo": grpo,
    "dr_grpo": lambda draws, **options: dr_grpo(draws, max_length=8, **options),
    "dapo": lambda draws, denominator=None, **options: dapo(
        draws, tokens=float(draws.mask.sum()) if denominator is None else denominator, **options
    ),
}
ADVANTAGES = {
    "rloo": LeaveOneOutAdvantage(),
    "reinforce++": WhitenedAdvantage(),
    "grpo": GroupStandardizedAdvantage(),
    "dr_grpo": GroupMeanAdvantage(),
    "dapo": GroupStandardizedAdvantage(),
}


class Batch:
    """Ragged groups out of order, one alone in its group, one group all equal; masks with holes; off-policy or not."""

    def __init__(self, off_policy, dtype=torch.float64, seed=0):
        generator = torch.Generator().manual_seed(seed)
        N, T = 12, 8
        self.group = torch.tensor([5, 9, 5, 9, 9, 2, 5, 7, 7, 9, 5, 7])  # 2 is alone
        self.reward = torch.randint(0, 4, (N,), generator=generator).to(dtype) / 3
        self.reward[self.group == 7] = 0.5
        self.reward[:2] = torch.tensor([1.0, 0.0], dtype=dtype)
        self.mask = torch.rand(N, T, generator=generator) < 0.7
        self.mask[:, 0] = True
        self.logp = (-torch.rand(N, T, generator=generator).to(dtype) - 0.5).requires_grad_()
        noise = 0.4 * torch.randn(N, T, generator=generator).to(dtype)
        self.behaviour = self.logp.detach() + noise if off_policy else None

    def draws(self):
        return sequence_draws(self.logp, self.reward, mask=self.mask, group=self.group, behaviour_logp=self.behaviour)

    # the published formulas, by plain loops over Python numbers -------------------------------------------------

    def others(self, i):
        return [j for j in range(12) if self.group[j] == self.group[i]]

    def group_mean(self, i):
        members = self.others(i)
        if len(members) == 1:
            return float(self.reward[i])
        return float(self.reward[i]) - sum(float(self.reward[j]) for j in members) / len(members)

    def leave_one_out(self, i):
        rest = [float(self.reward[j]) for j in self.others(i) if j != i]
        return float(self.reward[i]) - (sum(rest) / len(rest) if rest else 0.0)

    def standardized(self, i, epsilon):
        members = [float(self.reward[j]) for j in self.others(i)]
        if len(members) == 1:
            return float(self.reward[i])
        mean = sum(members) / len(members)
        spread = math.sqrt(sum((r - mean) ** 2 for r in members) / (len(members) - 1))
        return (float(self.reward[i]) - mean) / (spread + epsilon)

    def whitened(self, epsilon):
        every = [self.group_mean(i) for i in range(12) for t in range(8) if self.mask[i, t]]
        mean = sum(every) / len(every)
        variance = sum((a - mean) ** 2 for a in every) / (len(every) - 1)
        return [(self.group_mean(i) - mean) / math.sqrt(variance + epsilon) for i in range(12)]

    def tokens(self, i):
        return [t for t in range(8) if self.mask[i, t]]

    def ratio(self, i, t):
        if self.behaviour is None:
            return (self.logp[i, t] - self.logp[i, t].detach()).exp()
        return (self.logp[i, t] - self.behaviour[i, t]).exp()

    def clipped(self, i, t, advantage, low, high):
        ratio = self.ratio(i, t)
        return min(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)

    def published(self, name):
        rows = range(12)
        if name == "rloo":
            total = 0.0
            for i in rows:
                weight = 1.0
                for t in self.tokens(i):
                    weight = weight * self.ratio(i, t).detach()
                total = total + weight * self.leave_one_out(i) * sum(self.logp[i, t] for t in self.tokens(i))
            return total / 12
        if name == "grpo":
            return sum(
                sum(self.clipped(i, t, self.standardized(i, 1e-4), 0.2, 0.2) for t in self.tokens(i))
                / len(self.tokens(i))
                for i in rows
            ) / 12  # fmt: skip
        if name == "dr_grpo":
            return sum(self.clipped(i, t, self.group_mean(i), 0.2, 0.2) for i in rows for t in self.tokens(i)) / (
                12 * 8
            )
        if name == "dapo":
            every = [self.clipped(i, t, self.standardized(i, 1e-4), 0.2, 0.28) for i in rows for t in self.tokens(i)]
            return sum(every) / len(every)
        white = self.whitened(1e-8)
        return sum(self.clipped(i, t, white[i], 0.2, 0.2) for i in rows for t in self.tokens(i)) / 12
