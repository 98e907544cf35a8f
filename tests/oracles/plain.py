"""Every tuple of points of a plain distribution, through every entry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import scorefn as sf
from tests.oracles.families import Family
from tests.oracles.tolerances import EXACT
from tests.oracles.toys import coordinates


class Replay:
    """All N-tuples of points, handed out by the distribution's own `sample`."""

    def __init__(self, family: Family, N: int) -> None:
        self.family, self.N, self.parameters = family, N, family.parameters()
        with torch.no_grad():
            points, weight = family.points(*self.parameters)
        choice = coordinates(*[len(points)] * N).T
        self.x, self.weight = points[choice], weight[choice].prod(0)
        self.p = family.build(*self.parameters)
        self.p = self.p.expand((choice.shape[1], *self.p.batch_shape))
        self.p.sample = self._sample  # type: ignore[method-assign]

    def _sample(self, sample_shape: torch.Size) -> Tensor:
        assert tuple(sample_shape) == (self.N,)
        return self.x

    def f(self, x: Tensor) -> Tensor:
        return self.family.f(x, *self.parameters)


PLAIN_ENTRIES: dict[str, Callable[..., Tensor]] = {
    "surrogate": lambda p, f, N, baseline: sf.surrogate(sf.draw(p, f, N), baseline=baseline).mean(0),
    "dice": lambda p, f, N, baseline: sf.dice(sf.draw(p, f, N), baseline=baseline).mean(0),
    "expectation": lambda p, f, N, baseline: sf.expectation(p, f, N, baseline=baseline),
}


def check_plain(family: Family, N: int, baseline: Any, entry: str) -> None:
    """Expected value and gradient over all N-tuples of points are the true ones, to 1e-10."""
    replay = Replay(family, N)
    where = f"{entry}, {baseline}, on {family.name} with N = {N}"
    try:
        estimate = PLAIN_ENTRIES[entry](replay.p, replay.f, N, baseline)
    except sf.ScorefnError as error:
        raise AssertionError(f"refused: {where}: {error}") from error
    assert estimate.shape == replay.weight.shape, f"{where}: shape {tuple(estimate.shape)}"
    ours, truth = (replay.weight * estimate).sum(), family.truth(*replay.parameters)
    assert abs(float(ours.detach() - truth.detach())) < EXACT, f"{where}: value {ours.item()} for {truth.item()}"
    pairs = zip(
        *[torch.autograd.grad(value, replay.parameters, materialize_grads=True) for value in (ours, truth)], strict=True
    )
    for index, (mine, true) in enumerate(pairs):
        gap = float((mine - true).abs().nan_to_num(nan=torch.inf).max())
        assert gap < EXACT, f"{where}: the gradient of parameter {index} is off by {gap:.3g}"
