"""Coupled draws, enumerated cell by cell."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor

import scorefn as sf
from scorefn.reducers import couplings, quantiles
from tests.oracles.families import FAMILIES, Family
from tests.oracles.quadrature import gauss_hermite
from tests.oracles.tolerances import EXACT
from tests.oracles.toys import coordinates


class Dice:
    """Every outcome of a coupling's own randomness, side by side along a problem axis T.

    The sources of randomness of `scorefn.reducers.couplings` are replaced: a first run, with T = 1, records what is
    asked for; each number asked for has an alphabet (the cells of a uniform, the values of an integer, the
    permutations of a block), and the second run hands out every word of these alphabets, with its probability.

    Args:
        cells: places and volumes `[C]` that stand for a uniform, exact where what is integrated is constant in each.
    """

    def __init__(self, cells: tuple[Tensor, Tensor]) -> None:
        self.cells, self.T = cells, 1
        self.sizes: list[int] = []
        self.words: Tensor | None = None  # [T, slots]; None while recording
        self.used = 0
        self.volume = torch.ones(1, dtype=torch.float64)

    def _roll(self, slots: int, letters: int) -> Tensor:
        """The letters of the next slots, `[slots, T]`."""
        if self.words is None:
            self.sizes += [letters] * slots
            return torch.zeros(slots, 1, dtype=torch.long)
        rolled = self.words[:, self.used : self.used + slots].T
        self.used += slots
        return rolled

    def rand(self, shape: Sequence[int], device: Any) -> Tensor:
        rolled = self._roll(torch.Size(shape).numel() // self.T, len(self.cells[0]))
        self.volume = self.volume * self.cells[1][rolled].prod(0)
        return self._placed(self.cells[0][rolled], shape)

    def integers(self, low: int, high: int, shape: Sequence[int], device: Any) -> Tensor:
        rolled = self._roll(torch.Size(shape).numel() // self.T, high - low)
        self.volume = self.volume / (high - low) ** len(rolled)
        return self._placed(low + rolled, (shape[0], 1, self.T, -1)).reshape(shape)

    def permutations(self, count: int, size: int, shape: torch.Size, device: Any) -> Tensor:
        every = torch.tensor(list(permutations(range(size))))
        rolled = self._roll(count * shape.numel() // self.T, len(every))
        self.volume = self.volume / len(every) ** len(rolled)
        placed = self._placed(rolled, (count, 1, *shape))
        return every[placed].movedim(-1, 1).squeeze(2)

    def sobol(self, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The first coordinates of the sequence, once for every outcome."""
        return lambda dimension, size: original(dimension // self.T, size).repeat(1, self.T)

    def _placed(self, rolled: Tensor, shape: Sequence[int]) -> Tensor:
        """`[slots, T]` to a shape `[a, b, T, *rest]`: T comes third."""
        return rolled.reshape(*shape[:2], -1, self.T).movedim(-1, 2).reshape(tuple(shape))

    def uniforms(self, coupling: Any, N: int, event: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """All outcomes of `coupling.uniforms`: `[N, T, *event]`, block `[N]` and probability `[T]`."""
        with pytest.MonkeyPatch.context() as patch:
            for name in ("rand", "integers", "permutations"):
                patch.setattr(couplings, f"_{name}", getattr(self, name))
            patch.setattr(couplings, "_sobol", self.sobol(couplings._sobol))
            patch.setattr(couplings.SobolEngine, "MAXDIM", 10**9)
            coupling.uniforms(N, torch.Size((1, *event)))
            self.words = coordinates(*self.sizes)
            self.T, self.volume = len(self.words), torch.ones(len(self.words), dtype=torch.float64)
            u, block = coupling.uniforms(N, torch.Size((self.T, *event)))
        return u, block, self.volume


def cells_between(breaks: Tensor) -> tuple[Tensor, Tensor]:
    """The middles and the volumes of the cells into which break points divide (0, 1)."""
    inner = breaks[(breaks > 1e-12) & (breaks < 1 - 1e-12)].sort().values
    edges = torch.cat([torch.zeros(1).to(inner), inner, torch.ones(1).to(inner)])
    edges = edges[torch.cat([torch.tensor([True]), edges.diff() > 1e-12])]
    return (edges[1:] + edges[:-1]) / 2, edges.diff()


def steps_of(family: Family) -> Tensor:
    """Where the quantile of a discrete family jumps, over all its coordinates."""
    with torch.no_grad():
        p = family.build(*family.parameters())
        p = p.base_dist if isinstance(p, torch.distributions.Independent) else p
        if isinstance(p, torch.distributions.Bernoulli):
            return (1 - p.probs).reshape(-1)
        if isinstance(p, torch.distributions.Binomial):
            return p.log_prob(torch.arange(p.total_count + 1.0).to(p.probs)).exp().cumsum(0)
        return p.probs.cumsum(-1).reshape(-1)


@dataclass(frozen=True)
class CouplingRow:
    """A coupling, with the settings small enough to enumerate.

    Args:
        make: the coupling.
        size: draws per block.
        served: families and how many draws of each.
    """

    make: Callable[[], Any]
    size: int
    served: tuple[tuple[str, int], ...]

    def cells(self, family: Family) -> tuple[Tensor, Tensor]:
        """Cells of a uniform in which all draws are constant; or the nodes of a quadrature."""
        if "Normal" in family.name:
            nodes, weights = gauss_hermite(6)
            return torch.special.ndtr(nodes), weights
        steps = steps_of(family)
        if isinstance(self.make(), sf.Antithetic):
            return cells_between(torch.cat([steps, 1 - steps]))
        return cells_between((self.size * steps).frac())


COUPLINGS = {
    "Antithetic()": CouplingRow(
        sf.Antithetic, 2,
        (
            ("Bernoulli", 2), ("Bernoulli", 6), ("Categorical", 4), ("OneHotCategorical", 4), ("Binomial", 4),
            ("Bernoulli, independent problems", 4), ("Bernoulli, f over its batch", 4), ("Independent(Bernoulli)", 2),
            ("Independent(Bernoulli)", 4), ("Normal", 2), ("Normal", 4), ("Normal", 6),
            ("Normal, independent problems", 4), ("Independent(Normal)", 4), ("MultivariateNormal", 4),
        ),
    ),
    "Stratified(2)": CouplingRow(
        lambda: sf.Stratified(2), 2, (("Bernoulli", 2), ("Bernoulli", 6), ("Categorical", 4), ("Binomial", 4))
    ),
    "Stratified(3)": CouplingRow(lambda: sf.Stratified(3), 3, (("Bernoulli", 3), ("Bernoulli", 6), ("Categorical", 3))),
    "Stratified()": CouplingRow(sf.Stratified, 2, (("Bernoulli", 4), ("Bernoulli, independent problems", 4))),
    "Systematic(2)": CouplingRow(
        lambda: sf.Systematic(2), 2,
        (("Bernoulli", 6), ("Categorical", 4), ("OneHotCategorical", 4), ("Independent(Bernoulli)", 2)),
    ),
    "Systematic(3)": CouplingRow(lambda: sf.Systematic(3), 3, (("Bernoulli", 6), ("Categorical", 6), ("Binomial", 6))),
    "Sobol(2)": CouplingRow(
        lambda: sf.Sobol(2), 2, (("Bernoulli", 2), ("Bernoulli", 6), ("Categorical", 4), ("Independent(Bernoulli)", 2))
    ),
    "Sobol(4)": CouplingRow(lambda: sf.Sobol(4), 4, (("Bernoulli", 4), ("Bernoulli", 8), ("Categorical", 4))),
    "Sobol()": CouplingRow(sf.Sobol, 2, (("Bernoulli", 4), ("Bernoulli, independent problems", 4))),
}  # fmt: skip


@dataclass(frozen=True)
class Given:
    """A coupling whose uniforms and blocks are prepared."""

    u: Tensor
    block: Tensor
    unbiased = True

    def sample(self, p: Any, num_samples: int) -> tuple[Tensor, Tensor]:
        return sf.quantile(p, self.u), self.block


COUPLED_ENTRIES: dict[str, Callable[..., Tensor]] = {
    "surrogate": lambda p, f, N, coupling, baseline: sf.surrogate(
        sf.draw(p, f, N, coupling=coupling), baseline=baseline
    ).mean(0),
    "dice": lambda p, f, N, coupling, baseline: sf.dice(
        sf.draw(p, f, N, coupling=coupling), baseline=baseline
    ).mean(0),
    "expectation": lambda p, f, N, coupling, baseline: sf.expectation(p, f, N, coupling=coupling, baseline=baseline),
}  # fmt: skip


def check_coupling(name: str, family_name: str, N: int, baseline: Any, entry: str) -> None:
    """Expected value and gradient over all outcomes of the coupling's uniforms are the true ones, to 1e-10."""
    row, family = COUPLINGS[name], FAMILIES[family_name]
    where = f"{name}, {entry}, {baseline}, on {family_name} with N = {N}"
    parameters = family.parameters()
    p = family.build(*parameters)
    event = quantiles.uniform_shape(p)
    u, block, weight = Dice(row.cells(family)).uniforms(row.make(), N, tuple(event))
    assert abs(float(weight.sum()) - 1) < 1e-12, f"{where}: the probabilities sum to {weight.sum()}"
    p = p.expand((len(weight), *p.batch_shape))
    estimate = COUPLED_ENTRIES[entry](p, lambda x: family.f(x, *parameters), N, Given(u, block), baseline)
    ours = (weight.reshape(-1, *[1] * (estimate.ndim - 1)) * estimate).sum()
    check_expected(ours, family.truth(*parameters), parameters, where)


def check_expected(ours: Tensor, truth: Tensor, parameters: Sequence[Tensor], where: str) -> None:
    """Value and gradient are the true ones, to 1e-10."""
    assert abs(float(ours.detach() - truth.detach())) < EXACT, f"{where}: value {ours.item()} for {truth.item()}"
    pairs = zip(
        *[torch.autograd.grad(value, parameters, materialize_grads=True) for value in (ours, truth)], strict=True
    )
    for index, (mine, true) in enumerate(pairs):
        gap = float((mine - true).abs().nan_to_num(nan=torch.inf).max())
        assert gap < EXACT, f"{where}: the gradient of parameter {index} is off by {gap:.3g}"


def orthogonal_outcomes(count: int) -> tuple[Tensor, Tensor]:
    """Gaussian 2 x 2 matrices of `count` blocks, `[count, T, 2, 2]`, and probabilities `[T]`.

    In polar coordinates: 6 angles of the first column integrate trigonometric polynomials below degree 6, the second
    angle matters by its side only, and two Gauss-Laguerre nodes of half the squared lengths those of degree 3.
    """
    root = 2**0.5
    half_square = torch.tensor([2 - root, 2 + root], dtype=torch.float64)
    share = torch.tensor([(2 + root) / 4, (2 - root) / 4], dtype=torch.float64)
    angle, side, first, second = coordinates(6, 2, 2, 2).T
    turn = angle.double() * torch.pi / 3 + 0.1
    turns = torch.stack([turn, turn + torch.where(side == 0, 1.0, -1.3)], -1)
    radius = (2 * half_square[torch.stack([first, second], -1)]).sqrt()
    g = torch.stack([turns.cos(), turns.sin()], -2) * radius.unsqueeze(-2)  # [48, 2, 2]
    weight = share[first] * share[second] / 12
    words = coordinates(*[len(g)] * count).T
    return g[words], weight[words].prod(0)


def check_orthogonal(coupling: Any, family_name: str, count: int, baseline: Any, entry: str) -> None:
    """As `check_coupling`, for two-dimensional Gaussians in blocks of two directions; f is a polynomial of degree 2."""
    family, N = FAMILIES[family_name], count * (4 if coupling.mirrored else 2)
    where = f"{coupling}, {entry}, {baseline}, on {family_name} with N = {N}"
    parameters = family.parameters()
    g, weight = orthogonal_outcomes(count)
    p = family.build(*parameters).expand((len(weight),))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(couplings, "_randn", lambda shape, device: g.reshape(shape))
        estimate = COUPLED_ENTRIES[entry](p, lambda x: family.f(x, *parameters), N, coupling, baseline)
    check_expected((weight * estimate).sum(), family.truth(*parameters), parameters, where)
