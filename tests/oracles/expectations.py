"""Expected gradients over all tuples of a setting.

A check raises AssertionError, also where the library refuses what it should accept: the mutations count on that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import scorefn as sf
from tests.oracles.baselines import BASELINES
from tests.oracles.settings import CREDITS, Setting
from tests.oracles.tolerances import EXACT


class Prepared:
    """A structured measure whose draws are given: the way through the front door."""

    def __init__(self, draws: sf.Draws) -> None:
        self.prepared = draws

    def draws(self, f: Any, num_samples: int, *, coupling: Any = None) -> sf.Draws:
        return self.prepared


ENTRIES: dict[str, Callable[..., Tensor]] = {
    "surrogate": lambda draws, credit, baseline: sf.surrogate(draws, credit=credit, baseline=baseline).mean(0),
    "dice": lambda draws, credit, baseline: sf.dice(draws, credit=credit, baseline=baseline).mean(0),
    "expectation": lambda draws, credit, baseline: sf.expectation(
        Prepared(draws), None, len(draws), credit=credit, baseline=baseline
    ),
}


# ----------------------------------------------------------------------------------------------------------- checks


def deviation(given: Setting, credit_name: str, baseline: Any, entry: str) -> float:
    """Largest deviation of the expected gradient from the true one; the value must be right in any case.

    Args:
        given: the setting.
        credit_name: a row of CREDITS, or "own" for the draws' own credit.
        baseline: a baseline, None or "auto".
        entry: a row of ENTRIES.
    """
    row = CREDITS[given.toy.native if credit_name == "own" else credit_name]
    where = f"{entry}, {credit_name}, {baseline}, on {given}"
    try:
        credit = None if credit_name == "own" else row.make(given)
        estimate = ENTRIES[entry](given.draws, credit, baseline)
        expected = (given.weight * estimate).sum()
        gradient = torch.autograd.grad(expected, given.parameters, retain_graph=True, allow_unused=True)
    except sf.ScorefnError as error:
        raise AssertionError(f"refused: {where}: {error}") from error
    value_error = abs(float(expected.detach() - given.truth(row.discount)))
    assert value_error < EXACT, f"{where}: the expected value is off by {value_error:.3g}"
    gaps = [
        (truth if ours is None else ours - truth).abs().max()
        for ours, truth in zip(gradient, given.true_gradient(row.discount), strict=True)
    ]
    return float(torch.stack(gaps).nan_to_num(nan=torch.inf).max())


def check_exact(given: Setting, credit_name: str, baseline_name: str, entry: str) -> None:
    """The expected gradient is the true gradient to 1e-10."""
    credit = CREDITS[given.toy.native if credit_name == "own" else credit_name].make(given)
    baseline = "auto" if baseline_name == "auto" else BASELINES[baseline_name](given, credit)
    gap = deviation(given, credit_name, baseline, entry)
    assert gap < EXACT, f"{entry}, {credit_name}, {baseline_name}, on {given}: the gradient is off by {gap:.3g}"
