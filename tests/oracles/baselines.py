"""The table of baselines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

import scorefn as sf
from tests.oracles.settings import Setting
from tests.oracles.toys import values


class Lookup(nn.Module):
    """A value for each state: the plainest value function."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(values((40,), 11))

    def forward(self, state: Tensor) -> Tensor:
        return self.table[state]


def _remembered(given: Setting, credit: sf.core.Credit) -> sf.MovingAverage:
    """A moving average after three batches that have nothing to do with the draws it will meet."""
    average = sf.MovingAverage(0.7)
    draws = replace(given.draws, mask=None)
    width = draws.signal(credit).shape[-1]
    for step in range(3):
        past = values((given.layout.N, 1, *given.layout.batch, width), 30 + step)
        average.update(past.expand(*draws.log_prob.shape[:-1], width), draws)
    return average


BASELINES: dict[str, Callable[[Setting, sf.core.Credit], Any]] = {
    "None": lambda given, credit: None,
    "Constant(.7)": lambda given, credit: sf.Constant(0.7),
    "Constant([K])": lambda given, credit: sf.Constant(values((given.toy.K,), 12)),
    "Constant([N, *B, K])": lambda given, credit: sf.Constant(
        values((given.layout.N, 1, *given.layout.batch, given.toy.K), 13).expand(given.draws.log_prob.shape)
    ),
    "LeaveOneOut()": lambda given, credit: sf.LeaveOneOut(),
    "MovingAverage, new": lambda given, credit: sf.MovingAverage(),
    "MovingAverage, after three batches": _remembered,
    "OptimalConstant()": lambda given, credit: sf.OptimalConstant(),
    "RegressionBaseline": lambda given, credit: sf.RegressionBaseline(
        lambda draws: draws.context.double().unsqueeze(-1)
    ),
    "ValueFunction": lambda given, credit: sf.ValueFunction(Lookup()),
    "ValueFunction, [N, *B, K, 1]": lambda given, credit: sf.ValueFunction(
        nn.Sequential(Lookup(), nn.Unflatten(-1, (-1, 1))), features=lambda draws: draws.context
    ),
}
