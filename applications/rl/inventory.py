"""Inventory control with Poisson demand: ``python -m applications.rl.inventory``.

A shop orders every morning, sells what is asked for during the day, pays for what it keeps overnight and loses the
customers that it cannot serve; stock is carried over, and what is left after the last day is sold off. Demand is small
and discrete, so that everything is known exactly: the profit of any policy and its gradient by a recursion, the best
policy by dynamic programming, for one day the newsvendor's quantile. The policy that learns sees none of it, only what
the days earned.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import scorefn as sf


class Days(NamedTuple):
    """N seasons of T days."""

    stock: Tensor  # [N, T] int, in the morning
    orders: Tensor  # [N, T] int
    profits: Tensor  # [N, T]


@dataclass(frozen=True)
class Shop:
    """Prices and sizes; the order of a day arrives at once, and the shelf holds ``capacity``."""

    demand: float = 6.0  # mean of the Poisson
    price: float = 5.0
    cost: float = 3.0  # of a unit that is ordered
    holding: float = 0.4  # of a unit overnight
    salvage: float = 1.0  # of a unit that is left in the end
    delivery: float = 4.0  # of an order, whatever its size
    horizon: int = 10
    capacity: int = 20

    def demand_probabilities(self) -> Tensor:
        """``[capacity + 1]``; the last one is of all demand that empties the shelf whatever it holds."""
        p = torch.distributions.Poisson(torch.tensor(self.demand, dtype=torch.float64))
        probability = p.log_prob(torch.arange(self.capacity + 1, dtype=torch.float64)).exp()
        probability[-1] += 1.0 - probability.sum()
        return probability

    def allowed(self, stock: Tensor) -> Tensor:
        """Which of the orders 0, ..., capacity fit the shelf, bool ``[*stock, capacity + 1]``."""
        return stock.unsqueeze(-1) + torch.arange(self.capacity + 1) <= self.capacity

    def day(self, stock: Tensor, order: Tensor, demand: Tensor) -> tuple[Tensor, Tensor]:
        """Profit of a day, and the stock of the evening."""
        left = (stock + order - demand).clamp(min=0)
        sold = (stock + order - left).double()  # the exact values are to be exact
        earned = self.price * sold - self.cost * order - self.delivery * (order > 0) - self.holding * left
        return earned, left

    def tables(self) -> tuple[Tensor, Tensor]:
        """Expected profit ``[stock, order]`` and probability ``[stock, order, left]`` of a day; 0 where not allowed."""
        size = torch.arange(self.capacity + 1)
        stock, order, demand = torch.meshgrid(size, size, size, indexing="ij")
        earned, left = self.day(stock, order, demand)
        fits = self.allowed(size)
        p = self.demand_probabilities().expand_as(earned)
        probability = torch.zeros(earned.shape, dtype=torch.float64).scatter_add(-1, left.clamp(max=self.capacity), p)
        return (p * earned).sum(-1).where(fits, 0.0), probability.where(fits.unsqueeze(-1), 0.0)

    def end(self) -> Tensor:
        """What the stock after the last day is sold for, ``[stock]``."""
        return self.salvage * torch.arange(self.capacity + 1, dtype=torch.float64)

    def optimum(self) -> tuple[float, Tensor]:
        """Expected profit from an empty shop, and the best order ``[T, stock]``: dynamic programming."""
        profit, probability = self.tables()
        fits = self.allowed(torch.arange(self.capacity + 1))
        value = self.end()
        orders: list[Tensor] = []
        for _ in range(self.horizon):
            value, order = (profit + probability @ value).where(fits, -torch.inf).max(-1)
            orders.insert(0, order)
        return float(value[0]), torch.stack(orders)

    def expected_profit(self, log_policy: Tensor) -> Tensor:
        """Of a policy ``[T, stock, order]`` from an empty shop, exactly and differentiably."""
        profit, probability = self.tables()
        value = self.end()
        for policy in log_policy.to(value).exp().flip(0):
            value = (policy * (profit + probability @ value)).sum(-1)
        return value[0]


class OrderPolicy(nn.Module):
    """A network of day and stock, whose logits are one for each order."""

    def __init__(self, shop: Shop, hidden: int = 64) -> None:
        super().__init__()
        self.shop = shop
        self.network = nn.Sequential(nn.Linear(2, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh())
        self.logits = nn.Linear(hidden, shop.capacity + 1)

    def forward(self, day: Tensor, stock: Tensor) -> torch.distributions.Categorical:
        """Orders that do not fit the shelf are never chosen."""
        features = torch.stack([day / self.shop.horizon, stock / self.shop.capacity], -1)
        logits = self.logits(self.network((2 * features - 1).to(self.logits.weight)))
        return torch.distributions.Categorical(logits=logits.where(self.shop.allowed(stock), -torch.inf))

    def table(self) -> Tensor:
        """Log-probability of every order on every day with every stock, ``[T, stock, order]``."""
        day, stock = torch.arange(self.shop.horizon), torch.arange(self.shop.capacity + 1)
        logits = self(*torch.meshgrid(day, stock, indexing="ij")).logits
        return logits.clamp(min=-1e4)  # exp is 0, and its derivative no NaN


@dataclass(frozen=True)
class Seasons:
    """Seasons of a shop under a policy: a structured measure of one decision a day. The demand is not in its score."""

    shop: Shop
    policy: OrderPolicy

    def draws(self, f: Callable[[Days], Tensor], num_samples: int, *, coupling: Any = None) -> sf.Draws:
        """Simulate without gradient, score all days at once."""
        if coupling is not None:
            raise sf.ScorefnError("Seasons draw their demand independently: leave coupling out.")
        return self.score(f, self.simulate(num_samples))

    def score(self, f: Callable[[Days], Tensor], days: Days) -> sf.Draws:
        """Draws of given seasons."""
        time = torch.arange(self.shop.horizon).expand_as(days.stock)
        log_prob = self.policy(time, days.stock).log_prob(days.orders)
        return sf.Draws(days, log_prob, f(days).to(log_prob), credit=sf.RewardToGo(), context=(time, days.stock))

    @torch.no_grad()
    def simulate(self, num_samples: int) -> Days:
        """From torch's global generator."""
        demand = torch.poisson(torch.full((num_samples, self.shop.horizon), self.shop.demand)).long()
        stock, columns = torch.zeros(num_samples, dtype=torch.long), []
        for t in range(self.shop.horizon):
            order = self.policy(torch.full_like(stock, t), stock).sample()
            profit, left = self.shop.day(stock, order, demand[:, t])
            if t == self.shop.horizon - 1:
                profit = profit + self.shop.salvage * left
            columns.append((stock, order, profit))
            stock = left
        return Days(*(torch.stack(column, -1) for column in zip(*columns, strict=True)))


def profits(days: Days) -> Tensor:
    """The f of this problem, ``[N, T]``."""
    return days.profits


@dataclass
class Run:
    """What one training gave, all of it exact."""

    policy: OrderPolicy
    curve: list[float]  # expected profit, every 25 updates
    optimum: float
    seconds: float

    @property
    def greedy_share(self) -> float:
        """Of the optimum's expected profit, with the most probable orders."""
        table = self.policy.table().detach()
        greedy = torch.full_like(table, -torch.inf).scatter(-1, table.argmax(-1, keepdim=True), 0.0)
        return float(self.policy.shop.expected_profit(greedy)) / self.optimum

    @property
    def share(self) -> float:
        """Of the optimum's expected profit, with sampled orders."""
        return self.curve[-1] / self.optimum


def train(shop: Shop = Shop(), *, seed: int = 0, updates: int = 2000, seasons: int = 128, rate: float = 0.003) -> Run:
    """REINFORCE with reward-to-go and leave-one-out, and a learning rate that falls to nothing."""
    torch.manual_seed(seed)
    policy = OrderPolicy(shop)
    optimizer = torch.optim.Adam(policy.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, updates)
    measure, curve, seconds = Seasons(shop, policy), [], 0.0
    for update in range(updates + 1):
        if update % 25 == 0 or update == updates:
            curve.append(float(shop.expected_profit(policy.table().detach())))
        if update == updates:
            break
        start = time.process_time()
        surrogate = sf.surrogate(sf.draw(measure, profits, seasons), baseline=sf.LeaveOneOut()).mean()
        optimizer.zero_grad()
        (-surrogate).backward()
        optimizer.step()
        schedule.step()
        seconds += time.process_time() - start
    return Run(policy, curve, shop.optimum()[0], seconds)


def newsvendor(shop: Shop) -> int:
    """The best order of a single day from an empty shop, where delivery is paid for anyhow: a quantile of demand.

    The smallest q with ``P(demand <= q) >= (price - cost) / (price + holding - salvage)``.
    """
    fractile = (shop.price - shop.cost) / (shop.price + shop.holding - shop.salvage)
    return int((shop.demand_probabilities().cumsum(-1) >= fractile).nonzero()[0])


def main(argv: list[str] | None = None) -> int:
    """Train the one-day and the ten-day problem, print what was reached; 0 where both reach 97 % of the optimum."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--updates", type=int, default=2000)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)  # two threads on so small a network mostly wait for each other
    runs = []
    for days in (1, 10):
        shop = Shop(horizon=days)
        run = train(shop, seed=arguments.seed, updates=arguments.updates // (5 if days == 1 else 1))
        runs.append(run)
        share = f"{100 * run.share:.2f} % ({100 * run.greedy_share:.2f} % greedily)"
        before, after = run.curve[0], run.curve[-1]
        print(f"{days} day(s): expected profit {before:.2f} before, {after:.2f} after {run.seconds:.1f} CPU seconds")
        print(f"  optimum {run.optimum:.2f}: {share}")
        best, learned = shop.optimum()[1][0], run.policy.table()[0].argmax(-1)
        if days == 1:
            print(f"  order from an empty shop: newsvendor {newsvendor(shop)}, optimum {best[0]}, learned {learned[0]}")
        else:
            print(f"  first day's order with 0, 1, ... in stock: optimum {best.tolist()}")
            print(f"  {'learned':>47} {learned.tolist()}")
    return 0 if all(run.share >= 0.97 for run in runs) else 1


if __name__ == "__main__":
    sys.exit(main())
