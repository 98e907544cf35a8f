"""Search with the distribution that suits the problem: mixtures keep several optima, a Beta law keeps to its bounds.

``DistributionSearch`` takes any ``torch.distributions`` object whose density has a gradient; sampling needs none. What
is minimised here is the free energy of the search distribution p, at a temperature T that falls::

    F(p) = E f(x) + T E log p(x)  >=  -T log sum exp(-f / T)        with equality for p ~ exp(-f / T)

The search is told ``f(x) + T log p(x)``, and leave-one-out is its baseline: since E grad log p = 0, its gradient is
that of F. Without the entropy every distribution would end in one optimum; with it, p ends as close as its family
permits to the Boltzmann distribution, which holds them all.

Three problems, whose optima are known; integrals are exact (a grid, or enumeration)::

    himmelblau   (a^2 + b - 11)^2 + (a + b^2 - 7)^2, zero at four points: one Gaussian, or a mixture of 16
    twomax       minus the zeros or the ones of 12 bits, whichever are more: Bernoulli, or a mixture of four
    corner       |x - c|^2 over the unit cube, c on its boundary in two of five coordinates: Beta, by natural gradient
                 and ranks; no point is ever repaired

Run it with::

    python -m applications.bbo.any_distribution --seeds 5

Ctrl-C ends the present search after its generation; what was done is still compared and written. The pieces
(``Landscape``, the families, ``anneal``, ``corner``) are meant to be imported and copied.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Beta, Categorical, Distribution, Independent, MixtureSameFamily, Normal

import scorefn as sf
from applications.arguments import at_least
from applications.bbo.landscapes import Landscape, himmelblau_landscape, twomax_landscape
from applications.progress import Interruption, show_line
from applications.results import write_result

POPSIZE = 100


class Family:
    """A distribution as a function of parameters that take any value.

    Args:
        name: as tables have it.
        make: builds it from the parameters.
        parameters: where they start.
    """

    def __init__(self, name: str, make: Callable[..., Distribution], *parameters: Tensor) -> None:
        self.name, self.parameters = name, [value.double().requires_grad_() for value in parameters]
        self._make = make

    def __call__(self) -> Distribution:
        return self._make(*self.parameters)


def gaussian(seed: int) -> Family:
    """Two coordinates, independent; the centre is drawn."""
    centre = 2 * torch.randn(2, generator=torch.Generator().manual_seed(seed))
    return Family("gaussian", lambda m, s: Independent(Normal(m, s.exp()), 1), centre, torch.full((2,), math.log(2)))


def gaussian_mixture(seed: int, components: int = 16) -> Family:
    """The same for each component, and the shares of the components."""

    def make(logits: Tensor, m: Tensor, s: Tensor) -> Distribution:
        return MixtureSameFamily(Categorical(logits=logits), Independent(Normal(m, s.exp()), 1))

    centres = 2 * torch.randn(components, 2, generator=torch.Generator().manual_seed(seed))
    widths = torch.full((components, 2), math.log(2))
    return Family("gaussian mixture", make, torch.zeros(components), centres, widths)


def bernoulli(seed: int, bits: int = 12) -> Family:
    """Independent bits."""
    start = 0.1 * torch.randn(bits, generator=torch.Generator().manual_seed(seed))
    return Family("bernoulli", lambda logits: Independent(Bernoulli(logits=logits), 1), start)


def bernoulli_mixture(seed: int, bits: int = 12, components: int = 4) -> Family:
    """Independent bits in each component: in the mixture they are dependent."""

    def make(shares: Tensor, logits: Tensor) -> Distribution:
        return MixtureSameFamily(Categorical(logits=shares), Independent(Bernoulli(logits=logits), 1))

    start = torch.randn(components, bits, generator=torch.Generator().manual_seed(seed))
    return Family("bernoulli mixture", make, torch.zeros(components), start)


@dataclass(frozen=True)
class Search:
    """A search that was done.

    Attributes:
        gap: free energy above the smallest one, at the lowest temperature reached, exact.
        shares: of p, nearest to each optimum.
        farthest: from an optimum to the nearest of the told points, over the optima.
        kept: how many optima have half of their Boltzmann share or more.
        way: generation, temperature and gap, on the way.
        densities: generation and log density over the points of the landscape, on the way.
        seconds: of CPU, for asking, evaluating and telling.
    """

    landscape: str
    family: str
    seed: int
    gap: float
    shares: list[float]
    farthest: float
    kept: int
    evaluations: int
    way: list[tuple[int, float, float]]
    densities: list[tuple[int, Tensor]]
    seconds: float

    def summary(self) -> dict[str, Any]:
        """What ``result.json`` says of it."""
        return {name: value for name, value in vars(self).items() if name != "densities"}


def anneal(
    landscape: Landscape,
    family: Family,
    seed: int,
    generations: int,
    *,
    popsize: int = POPSIZE,
    learning_rate: float = 0.1,
    progress: Callable[[int, float, float], None] = lambda generation, temperature, gap: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Search:
    """Minimise the free energy; the temperature falls geometrically over the first three quarters.

    Args:
        landscape: the problem.
        family: whose parameters are changed.
        seed: of the search.
        generations: how many.
        popsize: points of each.
        learning_rate: of Adam, falling to a tenth over the last quarter.
        progress: called ten times on the way, with generation, temperature and gap.
        should_stop: asked after every generation.
    """
    optimizer = torch.optim.Adam(family.parameters, lr=learning_rate)
    strategy = sf.search.DistributionSearch(
        family,
        family.parameters,
        popsize=popsize,
        optimizer=optimizer,
        shape=None,
        baseline=sf.LeaveOneOut(),
        seed=seed,
        maxiter=generations,
        tolstagnation=0,
    )
    nearest = torch.full((len(landscape.optima),), torch.inf, dtype=torch.float64)
    way, densities, seconds = list[tuple[int, float, float]](), list[tuple[int, Tensor]](), 0.0
    for generation in range(1, generations + 1):
        begin = time.process_time()
        done = generation / generations
        temperature = landscape.hot * (landscape.cold / landscape.hot) ** min(1.0, done / 0.75)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * 10 ** -max(0.0, 4 * done - 3)
        x = strategy.ask()
        with torch.no_grad():
            told = landscape.f(x) + temperature * strategy.distribution.log_prob(x)
        strategy.tell(x, told)
        seconds += time.process_time() - begin
        nearest = torch.minimum(nearest, torch.cdist(landscape.optima, x).amin(1))
        stop = should_stop()
        if generation % max(1, generations // 50) == 0 or generation == generations or stop:
            gap = landscape.free_energy(strategy.distribution, temperature) - landscape.least(temperature)
            way.append((generation, temperature, gap))
        if generation % max(1, generations // 10) == 0 or generation == generations or stop:
            progress(*way[-1])
        if generation in {1, generations // 4, generations // 2, generations} or stop:
            with torch.no_grad():
                densities.append((generation, strategy.distribution.log_prob(landscape.points)))
        if stop:
            break
    shares = landscape.shares(densities[-1][1])
    return Search(
        landscape=landscape.name,
        family=family.name,
        seed=seed,
        gap=way[-1][2],
        shares=shares.tolist(),
        farthest=float(nearest.max()),
        kept=int((shares >= landscape.boltzmann_shares() / 2).sum()),
        evaluations=strategy.result.evaluations,
        way=way,
        densities=densities,
        seconds=seconds,
    )


CORNER = torch.tensor([0.0, 1.0, 0.3, 0.5, 0.9], dtype=torch.float64)


def corner(seed: int, generations: int = 1000, *, should_stop: Callable[[], bool] = lambda: False) -> dict[str, Any]:
    """Minimise ``|x - CORNER|^2`` over the unit cube with independent Beta distributions, uniform at first.

    Returns:
        seed; evaluations until a value of 1e-6 (or all); best, the lowest value; inside, whether every point was.
    """
    family = Family("beta", lambda a, b: Independent(Beta(a.exp(), b.exp()), 1), torch.zeros(5), torch.zeros(5))
    strategy = sf.search.DistributionSearch(
        family, family.parameters, popsize=20, natural=True, seed=seed, maxiter=generations, ftarget=1e-6
    )
    inside = True
    while not strategy.stop and not should_stop():
        x = strategy.ask()
        inside = inside and bool(((x >= 0) & (x <= 1)).all())
        strategy.tell(x, (x - CORNER).square().sum(1))
    result = strategy.result
    return {
        "seed": seed,
        "evaluations": result.evaluations,
        "best": result.best_f,
        "inside": inside,
        "stop": list(result.stop),
    }


PROBLEMS: list[tuple[Callable[[], Landscape], list[Callable[[int], Family]]]] = [
    (himmelblau_landscape, [gaussian, gaussian_mixture]),
    (twomax_landscape, [bernoulli, bernoulli_mixture]),
]


def table(searches: Sequence[Search], optima: dict[str, int]) -> list[dict[str, Any]]:
    """One row for each landscape and family: optima kept in each run, and means."""
    groups: dict[tuple[str, str], list[Search]] = {}
    for one in searches:
        groups.setdefault((one.landscape, one.family), []).append(one)
    return [
        {
            "landscape": landscape,
            "family": family,
            "optima": optima[landscape],
            "kept": [one.kept for one in group],
            "gap": sum(one.gap for one in group) / len(group),
            "farthest": max(one.farthest for one in group),
            "evaluations": group[0].evaluations,
            "seconds": sum(one.seconds for one in group) / len(group),
        }
        for (landscape, family), group in groups.items()
    ]


def plot(searches: Sequence[Search], landscape: Landscape, path: Path) -> None:
    """The density over Himmelblau's function of the first search of each family, and the way of all gaps."""
    from matplotlib.figure import Figure

    first = {one.family: one for one in reversed(searches) if one.landscape == landscape.name}
    columns = max((len(one.densities) for one in first.values()), default=0) + 1
    figure = Figure(figsize=(3.2 * columns, 3 * max(1, len(first))), layout="constrained")
    panels = figure.subplots(max(1, len(first)), columns, squeeze=False)
    side = math.isqrt(len(landscape.points))
    edge = float(landscape.points.max())
    extent = (-edge, edge, -edge, edge)
    for row, one in zip(panels, first.values(), strict=False):
        for panel, (generation, log_density) in zip(row[1:], one.densities, strict=False):
            picture = log_density.exp().view(side, side).T
            panel.imshow(picture.numpy(), origin="lower", extent=extent, cmap="Greys")
            panel.plot(*landscape.optima.T.tolist(), "r+")
            panel.set(title=f"{one.family}, {generation}", xticks=[], yticks=[])
        row[0].set(yscale="log", xlabel="generation", ylabel="gap / temperature", title=one.family)
        for number, other in enumerate(other for other in searches if other.family == one.family):
            label = "all seeds" if number == 0 else None
            row[0].plot([w[0] for w in other.way], [w[2] / w[1] for w in other.way], color="C0", lw=0.7, label=label)
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> int:
    """Search each landscape with both of its families, then the corner."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=at_least(1), default=5, help="how many searches, of seeds 0, 1, ...")
    parser.add_argument("--first-seed", type=at_least(0), default=0)
    parser.add_argument("--generations", type=at_least(4), default=1000)
    parser.add_argument("--popsize", type=at_least(2), default=POPSIZE, help="leave-one-out takes two or more")
    parser.add_argument("--out", type=Path, default=Path("runs/any_distribution"), help="folder of result and plot")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)  # before the work: a path that cannot be is found out at once
    landscapes = [made() for made, _ in PROBLEMS]
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    work = [
        (landscape, family, seed)
        for landscape, (_, families) in zip(landscapes, PROBLEMS, strict=True)
        for seed in seeds
        for family in families
    ]
    searches, corners = list[Search](), list[dict[str, Any]]()
    with Interruption() as interrupted:
        for landscape, make, seed in work:
            family = make(seed)
            head = f"{landscape.name}, {family.name}, seed {seed}:"

            def show(generation: int, temperature: float, gap: float, head: str = head) -> None:
                last = generation == options.generations
                show_line(
                    f"{head} generation {generation}, T {temperature:7.3f}, {gap / temperature:8.4f} T above".ljust(
                        100
                    ),
                    last=last,
                )

            found = anneal(
                landscape,
                family,
                seed,
                options.generations,
                popsize=options.popsize,
                progress=show,
                should_stop=interrupted,
            )
            if interrupted():
                break
            searches.append(found)
        for seed in seeds:
            if interrupted():
                break
            corners.append(corner(seed, options.generations, should_stop=interrupted))
            show_line(f"corner, seed {seed}: {corners[-1]['best']:.1e}".ljust(100), last=True)
    rows = table(searches, {landscape.name: len(landscape.optima) for landscape in landscapes})
    print(f"\n{'':12s}{'':20s}{'optima kept':>20s}{'gap':>9s}{'farthest':>10s}{'CPU s':>8s}")
    for row in rows:
        kept = f"{', '.join(map(str, row['kept']))} of {row['optima']}"
        numbers = f"{kept:>20s}{row['gap']:9.4f}{row['farthest']:10.4f}{row['seconds']:8.1f}"
        print(f"{row['landscape']:12s}{row['family']:20s}{numbers}")
    for one in corners:
        print(f"corner, beta, seed {one['seed']}: {one['best']:.1e} after {one['evaluations']} evaluations")
    record = {
        "complete": not interrupted(),
        "boltzmann_shares": {landscape.name: landscape.boltzmann_shares().tolist() for landscape in landscapes},
        "table": rows,
        "searches": [one.summary() for one in searches],
        "corners": corners,
    }
    write_result(options.out, vars(options), record)
    if searches:
        plot(searches, landscapes[0], options.out / "any_distribution.png")
    return 130 if interrupted() else 0


if __name__ == "__main__":
    sys.exit(main())
