"""The estimator whose precision is cheapest on one's own problem: measured, with reasons, as code to paste."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from scorefn.core import Integrand, Measure, ScorefnError, check_count
from scorefn.core.representation import representation
from scorefn.diagnostics.compare import Comparison, ranked
from scorefn.diagnostics.estimation import Estimator, checked_parameters
from scorefn.diagnostics.prices import FEWEST, Cost, Measurement, check_cost, effective_repeats, prices_of, seconds
from scorefn.diagnostics.race import CONFIDENCE, EVENTS, MARGIN, SILENT, Race
from scorefn.diagnostics.shortlist import shortlist


@dataclass(frozen=True)
class Recommendation:
    """What ``recommend`` found; true only where it is decided.

    Attributes:
        winner: name of the estimator of the least price, among those whose mean is the gradient.
        estimator: it, ``(p, f) -> [*B]``.
        code: it, as Python to paste.
        reasons: sentences: why it won, and by name why each other estimator did not.
        comparison: of all that were measured, without a pathwise gradient that was neither proven nor refuted.
        probability: that the winner's price is at most 1.1 times the least, by bootstrap.
        decided: whether that is at least .95, the winner's variance rests on enough repeats (30 that matter, or 1000
            where no noise was seen), and no cheaper pathwise gradient is left neither proven nor refuted.
        evaluations: of f, that were spent.
        budget: that might have been.
        enough: about what budget would decide it; the present one where it is decided.

    Example:
        >>> import torch
        >>> from scorefn.diagnostics import recommend
        >>> _ = torch.manual_seed(0)
        >>> logits = torch.zeros(2, requires_grad=True)
        >>> p = torch.distributions.Bernoulli(logits=logits)
        >>> found = recommend(p, lambda x: x.prod(-1), logits, budget=400)
        >>> found.winner, found.decided, found.evaluations <= found.budget
        ('Enumerate', True, True)
        >>> found.reasons[0].split(".")[0]
        'Enumerate: the support has 4 values: no noise'
    """

    winner: str
    estimator: Estimator
    code: str
    reasons: tuple[str, ...]
    comparison: Comparison
    probability: float
    decided: bool
    evaluations: int
    budget: int
    enough: int

    __repr__ = representation

    def __bool__(self) -> bool:
        """Whether the winner was decided."""
        return self.decided

    def __str__(self) -> str:
        """The reasons, the measurements and the code."""
        heading = (
            f"{self.winner} is the cheapest: within 10 % of the best with probability {self.probability:.2f}."
            if self.decided
            else f"Not decided: {self.winner} leads, within 10 % of the best of those that are known to be right with "
            f"probability {self.probability:.2f}; a budget of about {self.enough} evaluations would decide it."
        )
        spent = f"{self.evaluations} of {self.budget} evaluations of f were spent."
        return "\n".join([heading, *(f"- {reason}" for reason in self.reasons), spent, "", self.code])


def recommend(
    p: Measure,
    f: Integrand,
    params: Tensor | Iterable[Tensor],
    budget: int,
    *,
    num_samples: int = 8,
    cost: Cost = seconds,
) -> Recommendation:
    """Measure a shortlist of unbiased estimators on a problem and return the one whose precision is cheapest.

    The shortlist follows from p: leave-one-out, no baseline and the optimal constant always; on independent sites of
    few values the joint estimators; elsewhere couplings, control variates, and the pathwise gradient. The price is
    total variance x cost. It is measured in rounds: after each, those are dropped whose price is more than 10 % above
    the least at 99 % confidence (successive halving), and what is left of the budget goes to the others. An estimator
    that cannot serve the problem is left out, with what it said.

    The pathwise gradient is wrong, silently, where f jumps. So it may win only after its mean was shown to be that of
    a score-function estimate: in each coordinate to 10 % of the largest one, at 99.99 % confidence. At a place where
    the gradient is 0, this cannot be shown, and it is left out.

    Args:
        p: the distribution or measure, built from the parameters.
        f: the integrand, x ``[N, *batch, *event]`` to ``[N, *B]``; it may itself depend on the parameters.
        params: the tensors to differentiate; neither they nor their ``.grad`` are changed.
        budget: evaluations of f that may be spent on measuring in all: leading rows of the draws that f is given. It
            is never exceeded.
        num_samples: evaluations of f that one gradient may cost, at most; 2 or more.
        cost: of one estimate: ``seconds`` of CPU, ``evaluations`` where f is dear, or your own function of
            ``GradientStatistics``.

    Raises:
        ScorefnError: a budget below 4 num_samples, which cannot measure two estimators twice; num_samples below 2; a
            cost that is no function; leave-one-out cannot be measured on the problem.
        ShapeError, SupportError, NonFiniteError: as ``scorefn.expectation`` raises them on the problem.

    Sources: Jamieson & Talwalkar (2016), "Non-stochastic best arm identification and hyperparameter optimization", for
    successive halving; Geffner & Domke (2020), "A rule for gradient estimator selection", for the price.

    Example:
        >>> import torch
        >>> from scorefn.diagnostics import recommend
        >>> _ = torch.manual_seed(0)
        >>> logits = torch.zeros(3, requires_grad=True)
        >>> p = torch.distributions.Bernoulli(logits=logits)
        >>> found = recommend(p, lambda x: x.prod(-1), logits, 1000)
        >>> found.winner, bool(found)
        ('Enumerate', True)
        >>> print(found.code)
        import scorefn as sf
        <BLANKLINE>
        estimate = sf.Enumerate()(p, f)  # shape [*B], differentiable: backward() of its sum
        <BLANKLINE>
    """
    count, most = check_count("num_samples", num_samples), check_count("budget", budget)
    if count < 2:
        raise ScorefnError("num_samples=1 leaves nothing to choose from: let a gradient cost 2 evaluations or more.")
    if most < 4 * count:
        raise ScorefnError(
            f"budget={most} evaluations of f cannot measure two estimators of {count} evaluations twice, which takes "
            f"{4 * count}: raise budget to some thousand times num_samples, or lower num_samples."
        )
    check_cost(cost)
    race = Race(p, f, checked_parameters(params), most, count, cost)
    race.enter()
    race.run()
    return _result(race)


def _result(race: Race) -> Recommendation:
    """The winner and the reasons."""
    measurements = race.measurements(race.entrants)
    winner, probability, reliable = race.verdict(measurements)
    decided = reliable and probability >= CONFIDENCE and not race.unresolved()
    samples = prices_of(measurements, race.cost)[1]
    shown = {*race.proven(), *race.bias_z}
    comparison = ranked({n: m for n, m in measurements.items() if n in shown}, race.cost, race.bias_z, CONFIDENCE)
    own = [c for c in shortlist(race.p, race.f, race.num_samples, race.problems).candidates if c.name == winner]
    spent = race.budget - race.meter.left
    return Recommendation(
        winner=winner,
        estimator=own[0].estimator,
        code=own[0].code,
        reasons=tuple(_reasons(race, winner, comparison, samples)),
        comparison=comparison,
        probability=probability,
        decided=decided,
        evaluations=spent,
        budget=race.budget,
        enough=race.budget if decided else _enough(race, winner, samples, measurements[winner]),
    )


def _reasons(
    race: Race, winner: str, comparison: Comparison, samples: Mapping[str, NDArray[np.float64]]
) -> Iterable[str]:
    s, entrant = comparison.statistics[winner], race.entrants[winner]
    yield (
        f"{winner}: {entrant.candidate.reason}. Variance {s.total_variance:.4g} at {entrant.evaluations} "
        f"evaluations and {1e3 * s.seconds:.3f} ms, price {comparison.prices[winner]:.4g} (variance x "
        f"{comparison.cost_name}), from {s.repeats} repeats."
    )
    if not samples[winner].any():
        yield f"{winner}: no noise was seen."
    elif winner != "leave-one-out":
        yield f"{winner}: {_ratio(samples, winner, 'leave-one-out')}."
    for name in comparison.names:
        if name != winner and name not in race.why:
            repeats = comparison.statistics[name].repeats
            yield f"{name}: {_ratio(samples, name, winner)}, from {repeats} repeats."
    for reason in dict.fromkeys(race.why.values()):
        names = ", ".join(name for name, why in race.why.items() if why == reason)
        yield f"{names}: left out: {reason}"


def _enough(race: Race, winner: str, samples: Mapping[str, NDArray[np.float64]], measurement: Measurement) -> int:
    """By how much the error of the log ratio to the nearest rival has to shrink, squared."""
    s = measurement.statistics
    if s.repeats < FEWEST:
        return 2 * SILENT * race.num_samples
    factor = max(2.0, min(race.missing, 1e4)) if race.unresolved() else 2.0
    if not samples[winner].any():
        factor = max(factor, SILENT / s.repeats)
    else:
        factor = max(factor, EVENTS / max(effective_repeats(s), 1e-3))
        others = [samples[name] for name in race.alive if name != winner and name in race.proven()]
        if others:
            ratio = np.log(samples[winner] / np.maximum(np.min(np.stack(others), axis=0), 1e-300))
            wanted = math.log(1 + MARGIN) / NormalDist().inv_cdf(CONFIDENCE)
            factor = max(factor, min(float(np.std(ratio)) / wanted, 1e3) ** 2)
    return math.ceil(race.budget * factor)


def _ratio(samples: Mapping[str, NDArray[np.float64]], name: str, to: str) -> str:
    """The ratio of two prices with its interval."""
    if not samples[to].any():
        return f"noise, where {to} has none" if samples[name].any() else "no noise was seen either, at no lower cost"
    low, middle, high = np.quantile(samples[name] / samples[to], [0.025, 0.5, 0.975], method="inverted_cdf")
    return f"{middle:.3g} ({low:.3g} .. {high:.3g}) times the price of {to}"
