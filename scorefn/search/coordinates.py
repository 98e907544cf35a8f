"""One coordinate at a time: the arm of a portfolio for separable problems with many optima."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from scorefn.core import ScorefnError
from scorefn.search.points import Numbers, as_sigma, as_start, is_number
from scorefn.search.ranking import Ranking
from scorefn.search.saved_state import check_finite
from scorefn.search.stopping import Limits
from scorefn.search.strategy import State, Strategy, checked_popsize

_PLACES = 10  # best places that are looked around at first, then one fewer each time
_AROUND = (-0.6, -0.3, 0.3, 0.6)  # where, in units of the present spacing
_FINER = 0.3
_PATIENT: dict[str, float | None] = {
    "maxiter": math.inf,
    "tolx": 0,
    "tolfun": 0,
    "tolfunhist": 0,
    "tolstagnation": 0,
    "tolflatfitness": math.inf,
}


class CoordinateSearch(Strategy):
    """Minimise along one coordinate after the other: the whole line first, then its best places, finer and finer.

    In the field's terms this is one sweep of cyclic coordinate search (axis-parallel line searches) whose line search
    is a global one, a grid that is refined around its best places. The first generation of a coordinate are points (64
    of them) evenly spaced over ``x_i +- 4 sigma0_i`` on the line through the best point so far. The next one looks at
    0.3 and 0.6 of the spacing to both sides of the best 10 points of the line, the one after it at 0.3 of these
    distances around the best 9, and so on, until the distance is below ``tolwidth`` times the line. Then it is the next
    coordinate's turn, and after the last one the search stops (``swept``).

    Of its kind is Swarzberg, Seront & Bersini (1994), "S.T.E.P.: the easiest way to optimize a function", whose line
    search halves intervals instead. A function whose coordinates do not act upon each other is solved by one sweep of
    some 300 evaluations a coordinate, however many optima each line has; on others this is no more than a start. It is
    no natural gradient; only the order of values enters. ``Portfolio`` spends a small part of a budget on it.

    Args:
        x0: ``[D]``, where the lines cross at first.
        sigma0: an eighth of the width of the lines, one number or ``[D]``.
        popsize: how many points the first generation of a coordinate has; None: 64.
        tolwidth: precision, as a part of the width of a line.
        seed: of the strategy's own generator; see ``SNES``.
        limits: when to stop, in pycma's words; see ``SNES``.

    Raises:
        ScorefnError: sigma0, tolwidth or a limit that makes no sense; an unknown limit.
        ShapeError: x0 is not one point.
        NonFiniteError: x0 is not finite.

    Example:
        >>> import torch
        >>> from scorefn.search import CoordinateSearch
        >>> strategy = CoordinateSearch([3.0, -2.0], sigma0=1.0, seed=0)
        >>> while not strategy.stop:
        ...     x = strategy.ask()
        ...     strategy.tell(x, (x.square() - 10 * torch.cos(2 * torch.pi * x)).sum(1) + 20)
        >>> strategy.stop, bool(strategy.result.best_f < 1e-8)
        ({'swept': 2}, True)
    """

    method = "coordinates"
    fits_products = False  # N changes
    open_entries = frozenset({"values"})  # infinite where an evaluation failed
    learns_from_ties = True  # a coordinate that f ignores has been searched, too

    def __init__(
        self,
        x0: Numbers,
        sigma0: float | Numbers,
        *,
        popsize: int | None = None,
        tolwidth: float = 1e-9,
        seed: int | torch.Generator | None = None,
        **limits: float | None,
    ) -> None:
        start = as_start(x0)
        sigma = as_sigma(sigma0, start)
        line = checked_popsize(64 if popsize is None else popsize, 10, "64")
        if not is_number(tolwidth) or not 0 < tolwidth < 1:
            raise ScorefnError(f"tolwidth must lie between 0 and 1, but it is {tolwidth!r}: it is a part of a line.")
        super().__init__(
            {
                "mean": start,
                "sigma": sigma,
                "coordinate": 0,
                "spacing": 8 * float(sigma[0]) / line,
                "looks": 0,
                "places": [],
                "values": [],
            },
            settings={"tolwidth": float(tolwidth), "line": line},
            shape=(line, len(start)),
            sigma0=sigma,
            seed=seed,
            limits=Limits.of_options(
                {**_PATIENT, **{name: value for name, value in limits.items() if value is not None}},
                "CoordinateSearch",
                ("popsize", "tolwidth", "seed"),
            ),
        )

    @property
    def mean(self) -> Tensor:
        """``[D]``, the best point of the lines so far; a copy."""
        mean: Tensor = self._state["mean"]
        return mean.clone()

    @property
    def sigma(self) -> Tensor:
        """``[D]``: sigma0 of a coordinate still to be searched, the width of the last cell afterwards; a copy."""
        sigma: Tensor = self._state["sigma"]
        return sigma.clone()

    def sampled(self) -> Tensor:
        """``[N, D]``: points that differ in one coordinate."""
        state, device = self._state, self._sigma0.device
        here = min(state["coordinate"], self.dimension - 1)  # the last line once more, where all are searched
        if state["looks"]:
            around = torch.tensor(_AROUND, dtype=torch.float64, device=device) * state["spacing"]
            places = (around.new_tensor(state["places"]).unsqueeze(1) + around).flatten()
        else:
            shift = torch.rand((), dtype=torch.float64, device=device, generator=self._generator)
            places = torch.arange(self.popsize, dtype=torch.float64, device=device) + (shift - self.popsize / 2)
            places = state["mean"][here] + state["spacing"] * places
        points: Tensor = state["mean"].repeat(len(places), 1)
        points[:, here] = places
        return points

    def learnt(self, points: Tensor, ranking: Ranking) -> State:
        """The best places of the line, and what is looked at next."""
        state = dict(self._state)
        i, looks = state["coordinate"], state["looks"]
        if i == self.dimension:
            return state
        values, places = state["values"] + ranking.values.tolist(), state["places"] + points[:, i].tolist()
        best = sorted(range(len(values)), key=values.__getitem__)[: max(1, _PLACES - looks)]
        state.update(values=[values[k] for k in best], places=[places[k] for k in best], looks=looks + 1)
        if looks:
            state["spacing"] *= _FINER
        here = torch.tensor(i, device=points.device)
        if math.isfinite(values[best[0]]) and not ranking.flat:
            state["mean"] = state["mean"].index_fill(0, here, places[best[0]])
        line = 8 * float(self._sigma0[i])
        if state["spacing"] < self._settings["tolwidth"] * line:
            state["sigma"] = state["sigma"].index_fill(0, here, state["spacing"])
            state.update(coordinate=i + 1, looks=0, places=[], values=[])
            if i + 1 < self.dimension:
                state["spacing"] = 8 * float(self._sigma0[i + 1]) / self._settings["line"]
        return state

    def check_popsize(self, popsize: int) -> None:
        """Any number: ``check_state`` compares it with what is due."""

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise ScorefnError where ``load_state_dict`` cannot take a state."""
        super().check_state(state)
        places, values, looks = state["places"], state["values"], state["looks"]
        check_finite("places", places)
        if (
            not all(isinstance(entry, float) and not math.isnan(entry) for entry in [*places, *values])
            or not len(places) == len(values)
            or bool(places) != (looks > 0)
            or not state["spacing"] > 0
            or state["coordinate"] > self.dimension
            or state["popsize"] != _due(state, state["line"])
        ):
            raise ScorefnError(
                f"The state is no sweep over {self.dimension} coordinates: coordinate {state['coordinate']}, look "
                f"{looks} of {len(places)} places with {len(values)} values, spacing {state['spacing']}, popsize "
                f"{state['popsize']}. Pass what state_dict() returned, undamaged."
            )

    def adopt(self, state: State) -> None:
        """The next generation may be of another size."""
        super().adopt(state)
        self._shape = (_due(state, self._settings["line"]), self._shape[1])

    def _fired(self) -> dict[str, float]:
        found = super()._fired()
        if self._state["coordinate"] == self.dimension:
            found["swept"] = self._state["coordinate"]
        return found


def _due(state: Mapping[str, Any], line: float) -> int:
    """How many points the next generation has; the first one of a coordinate has a whole line of them."""
    return len(_AROUND) * len(state["places"]) if state["looks"] else int(line)
