"""Steps of every kind, and advantages by loops."""

from typing import NamedTuple

import torch
from torch import nn

from scorefn.trajectories import Trajectories

DISCOUNT, LAMBDA = 0.9, 0.7


def doubles(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Steps(NamedTuple):
    rewards: torch.Tensor
    values: torch.Tensor
    next_values: torch.Tensor
    terminated: torch.Tensor
    done: torch.Tensor
    mask: torch.Tensor
    log_ratio: torch.Tensor

    @property
    def arguments(self):
        return self[:5]


def flags(rows):
    return torch.tensor([list(row) for row in rows])


def steps(seed=0):
    """Four streams: terminated, truncated, both, cut by the segment; with a filler row (`-`) after an end, or none.

    What stands in absent rows, and in the next value of a terminated step, is NaN.
    """
    letters = flags([map(ord, row) for row in ("..T-..", ".U.T.U", "B-....", "T-U-..")])
    mask, terminated = letters != ord("-"), (letters == ord("T")) | (letters == ord("B"))
    done = terminated | (letters == ord("U")) | (letters == ord("B"))
    values = doubles(4, 6, seed=seed + 1)
    inside = torch.zeros_like(mask)
    inside[:, :-1] = ~done[:, :-1]
    following = torch.where(inside, values.roll(-1, 1), doubles(4, 6, seed=seed + 2))
    return Steps(
        doubles(4, 6, seed=seed).where(mask, torch.nan),
        values.where(mask, torch.nan),
        following.where(mask & ~terminated, torch.nan),
        terminated,
        done,
        mask,
        (0.7 * doubles(4, 6, seed=seed + 3)).where(mask, torch.nan),
    )


def brute_gae(s, discount, lambda_):
    """The double loop."""
    advantage = torch.zeros_like(s.rewards)
    for n in range(len(s.rewards)):
        for t in range(s.rewards.shape[1]):
            weight, j = 1.0, t
            while s.mask[n, t]:
                after = 0.0 if s.terminated[n, j] else discount * s.next_values[n, j]
                advantage[n, t] += weight * (s.rewards[n, j] + after - s.values[n, j])
                weight *= discount * lambda_
                if s.done[n, j] or j + 1 == s.rewards.shape[1]:
                    break
                j += 1
    return advantage


def brute_vtrace(s, discount, rho_bar, c_bar, lambda_):
    """Equation 1, written out; and the advantage with the target of the next step."""
    targets, advantages = torch.zeros_like(s.rewards), torch.zeros_like(s.rewards)
    T = s.rewards.shape[1]
    for n in range(len(s.rewards)):
        for t in range(T):
            if not s.mask[n, t]:
                continue
            targets[n, t], weight = s.values[n, t], 1.0
            for j in range(t, T):
                ratio = float(s.log_ratio[n, j].exp())
                after = 0.0 if s.terminated[n, j] else discount * s.next_values[n, j]
                targets[n, t] += weight * min(rho_bar, ratio) * (s.rewards[n, j] + after - s.values[n, j])
                weight *= discount * lambda_ * min(c_bar, ratio)
                if s.done[n, j]:
                    break
        for t in range(T):
            if s.mask[n, t]:
                last = s.done[n, t] or t + 1 == T
                after = s.next_values[n, t] if last else targets[n, t + 1]
                after = 0.0 if s.terminated[n, t] else discount * after
                ratio = min(rho_bar, float(s.log_ratio[n, t].exp()))
                advantages[n, t] = ratio * (s.rewards[n, t] + after - s.values[n, t])
    return targets, advantages


# --------------------------------------------------------------------------------------------- temporal differences


class Counting(nn.Module):
    """`[*batch, 2] -> [*batch, 1]`; counts the observations it is asked for."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.network = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1), nn.Dropout(0.5)).double()
        self.asked = 0

    def forward(self, observations):
        self.asked += len(observations)
        return self.network(observations)


def trajectories():
    """The streams of `steps`, with observations; NaN where absent."""
    s = steps()
    inside = torch.zeros_like(s.mask)
    inside[:, :-1] = ~s.done[:, :-1]
    observations = doubles(4, 6, 2, seed=9).where(s.mask[..., None], torch.nan)
    following = torch.where(inside[..., None], observations.roll(-1, 1), doubles(4, 6, 2, seed=10))
    starts = torch.ones_like(s.mask)
    starts[:, 1:] = s.done[:, :-1] | ~s.mask[:, :-1]
    return Trajectories(
        observations, torch.zeros(4, 6), s.rewards, s.terminated, s.done & ~s.terminated, s.mask, following, starts
    )


def evaluated(module, tau):
    module.eval()
    values = module(tau.observations).squeeze(-1).detach().where(tau.mask, 0.0)
    following = module(tau.next_observations).squeeze(-1).detach().where(tau.mask & ~tau.terminated, 0.0)
    module.train()
    return values, following
