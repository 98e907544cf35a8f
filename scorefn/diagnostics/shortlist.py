"""Which estimators are worth measuring on a problem: a list that follows from the properties of the distribution."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Distribution, Independent, MultivariateNormal, Normal, OneHotCategorical

from scorefn.core import Integrand, ScorefnError, check_count, expectation
from scorefn.core.representation import representation
from scorefn.diagnostics.estimation import Estimation, Estimator
from scorefn.estimators import (
    ARMS,
    DisARM,
    DoubleControlVariate,
    Enumerate,
    LocalExpectation,
    SumAndSample,
    UnorderedSet,
)
from scorefn.estimators.sites import Sites
from scorefn.reducers import (
    Antithetic,
    DeltaMethod,
    LinearControlVariate,
    OptimalConstant,
    OrthogonalGaussian,
    Sobol,
    Stratified,
)

MOST_WEIGHED = 2**14
"""Joint values that an estimator may have to weigh for each gradient; beyond, it is not worth a try."""
LEARNERS = "MovingAverage, ValueFunction, BlockConstants, AdaptiveRaoBlackwell and NaturalControlVariate"


@dataclass(frozen=True)
class Candidate:
    """An estimator that is worth measuring; from ``shortlist``.

    Attributes:
        name: short.
        estimator: ``(p, f) -> [*B]``, unbiased.
        expression: the same as code, in terms of sf, p and f.
        reason: why it is on the list, one clause.
        pathwise: whether its mean has to be shown to be the gradient: it is only for a continuous f.
        exact: whether it has no variance by construction.

    Example:
        >>> import torch
        >>> from scorefn.diagnostics import shortlist
        >>> p = torch.distributions.Bernoulli(logits=torch.zeros(2, requires_grad=True))
        >>> best = next(c for c in shortlist(p, lambda x: x.sum(-1)).candidates if c.exact)
        >>> best.name, best.reason
        ('Enumerate', 'the support has 4 values: no noise')
        >>> best.expression
        'sf.Enumerate()(p, f)'
    """

    name: str
    estimator: Estimator
    expression: str
    reason: str
    pathwise: bool = False
    exact: bool = False

    __repr__ = representation

    @property
    def code(self) -> str:
        """Python to paste, with the p and f at hand: it sets ``estimate``, ``[*B]``."""
        module = "torch" if self.pathwise else "scorefn as sf"
        return f"import {module}\n\nestimate = {self.expression}  # shape [*B], differentiable: backward() of its sum\n"


@dataclass
class Shortlist:
    """The candidates for a problem; from ``shortlist``.

    Attributes:
        candidates: unbiased, and of at most the evaluations asked for; first what every problem admits, leave-one-out
            and no baseline.
        left_out: by name, why an estimator is not among them.

    Example:
        >>> import torch
        >>> from scorefn.diagnostics import shortlist
        >>> p = torch.distributions.Normal(torch.zeros((), requires_grad=True), 1.0)
        >>> found = shortlist(p, lambda x: x.square(), num_samples=2)
        >>> [candidate.name for candidate in found.candidates if candidate.pathwise]
        ['pathwise']
        >>> found.left_out["optimal constant"]
        'with two draws it is leave-one-out.'
    """

    candidates: list[Candidate] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    __repr__ = representation


def references(num_samples: int) -> list[Candidate]:
    """What every problem admits: leave-one-out, and no baseline to compare with."""
    n = num_samples
    return [
        Candidate(
            "leave-one-out",
            partial(expectation, num_samples=n),
            f"sf.expectation(p, f, {n})",
            "the default: it takes the mean of the other draws from each value",
        ),
        Candidate(
            "no baseline",
            partial(expectation, num_samples=n, baseline=None),
            f"sf.expectation(p, f, {n}, baseline=None)",
            "it wins where f is centred already",
        ),
    ]


def shortlist(p: Any, f: Integrand, num_samples: int = 8, batch_ndim: int = 0) -> Shortlist:
    """The estimators that are worth measuring on a problem: what follows from p alone, before anything is measured.

    Leave-one-out, no baseline and the optimal constant always; on independent sites of few values the joint
    estimators; elsewhere couplings, control variates, and the pathwise gradient. ``recommend`` measures them.

    Args:
        p: the distribution or measure.
        f: the integrand, which a control variate may have to know.
        num_samples: evaluations of f that one gradient may cost, at most; 2 or more.
        batch_ndim: how many leading batch dimensions are problems of their own.

    Raises:
        ScorefnError: p is no measure, f is not callable, fewer than 2 evaluations, or more dimensions than p has.

    Example:
        >>> import torch
        >>> from scorefn.diagnostics import shortlist
        >>> p = torch.distributions.Bernoulli(logits=torch.zeros(3, requires_grad=True))
        >>> found = shortlist(p, lambda x: x.sum(-1), num_samples=4)
        >>> [candidate.name for candidate in found.candidates][:4]
        ['leave-one-out', 'no baseline', 'optimal constant', 'LocalExpectation']
        >>> found.left_out["Enumerate"]
        'the support has 2^3 joint values, and a gradient may cost 4 evaluations.'
    """
    Estimation(p, f, partial(expectation, num_samples=2))  # refuses what is no p and no f
    if check_count("num_samples", num_samples) < 2:
        raise ScorefnError("num_samples=1: leave-one-out, with which all others are compared, takes 2 evaluations.")
    batch = tuple(getattr(p, "batch_shape", ()))
    if isinstance(batch_ndim, bool) or batch_ndim not in range(len(batch) + 1):
        raise ScorefnError(
            f"batch_ndim={batch_ndim!r}, but p has batch shape {batch}: give the number of its leading dimensions that "
            f"are problems of their own, 0 to {len(batch)}."
        )
    found, problems = Shortlist(references(num_samples)), batch_ndim
    n = num_samples
    if n > 2:
        found.candidates.append(
            Candidate(
                "optimal constant",
                partial(expectation, num_samples=n, baseline=OptimalConstant()),
                f"sf.expectation(p, f, {n}, baseline=sf.OptimalConstant())",
                "it weighs the other draws by their squared scores",
            )
        )
    else:
        found.left_out["optimal constant"] = "with two draws it is leave-one-out."
    if callable(getattr(p, "draws", None)):
        found.left_out["joint estimators and couplings"] = (
            f"{type(p).__name__} makes its own draws, several decisions at a time."
        )
    elif (sites := _sites(p, problems)) is not None:
        _finite(found, p, sites, n, problems)
    else:
        found.candidates += [*_enumerated(found, p, n, problems), *_coupled(found, n), *_taylor(p, f, n)]
        found.candidates += _pathwise(found, p, n)
    if not callable(getattr(p, "draws", None)):
        found.candidates += _linear(p, n, problems)
    found.left_out[LEARNERS] = (
        "they learn from past steps, which repeats at one place cannot show: compare them during training."
    )
    return found


def _sites(p: Any, problems: int) -> Sites | None:
    try:
        return Sites(p, None if isinstance(p, Independent) else problems, "shortlist")
    except ScorefnError:
        return None


def _finite(found: Shortlist, p: Any, sites: Sites, n: int, problems: int) -> None:
    """Independent sites of finitely many values."""
    declared = "" if isinstance(p, Independent) or problems == 0 else f"batch_ndim={problems}"
    batch_ndim = problems if declared else None
    size = sites.values**sites.count

    def add(name: str, estimator: Estimator, arguments: str, reason: str, *, exact: bool = False) -> None:
        found.candidates.append(Candidate(name, estimator, f"sf.{name}({arguments})(p, f)", reason, exact=exact))

    def with_batch(arguments: str) -> str:
        return ", ".join(part for part in (arguments, declared) if part)

    if size <= n:
        add("Enumerate", Enumerate(batch_ndim), with_batch(""), f"the support has {size} values: no noise", exact=True)
    else:
        found.left_out["Enumerate"] = _too_dear(f"the support has {sites.values}^{sites.count} joint values", n)
    one = 1 + sites.count * (sites.values - 1)
    if sites.count == 1:
        found.left_out["LocalExpectation"] = "with a single site it is Enumerate."
    elif one <= n:
        k = n // one
        add(
            "LocalExpectation",
            LocalExpectation(k, batch_ndim),
            with_batch(str(k)),
            f"the {sites.count} sites are few: each is summed while the others are held",
        )
    else:
        found.left_out["LocalExpectation"] = _too_dear(f"a base draw and its variants take {one} evaluations", n)
    if n < size <= MOST_WEIGHED:
        if n <= 16:
            add(
                "UnorderedSet",
                UnorderedSet(n, batch_ndim=batch_ndim),
                with_batch(str(n)),
                "different values only: it gains where the same value comes often",
            )
        else:
            found.left_out["UnorderedSet"] = "sets of at most 16 values are weighed."
        for k in sorted({n // 2, n - 1}, reverse=True):
            name = f"SumAndSample({k}, {n - k})"
            found.candidates.append(
                Candidate(
                    name,
                    SumAndSample(k, n - k, batch_ndim),
                    f"sf.SumAndSample({with_batch(f'{k}, {n - k}')})(p, f)",
                    f"it sums the {k} most probable of {size} values: it gains where p is sharp",
                )
            )
    elif size > MOST_WEIGHED:
        found.left_out["UnorderedSet and SumAndSample"] = (
            f"the {sites.values}^{sites.count} joint values would have to be weighed for each gradient."
        )
    pairs = n // 2
    add("DisARM", DisARM(pairs), str(pairs), "antithetic pairs: it gains where probabilities are near one half")
    if n > 2:
        add("ARMS", ARMS(n), str(n), f"{n} jointly antithetic draws")
    if isinstance(sites.unit, Bernoulli | OneHotCategorical):
        add(
            "DoubleControlVariate",
            DoubleControlVariate(n),
            str(n),
            "the gradient of f at the other draws foretells part of its value",
        )


def _enumerated(found: Shortlist, p: Any, n: int, problems: int) -> Iterator[Candidate]:
    """Finite supports of other families: Binomial, mixtures, measures that list their values."""
    if not (getattr(p, "has_enumerate_support", False) or hasattr(p, "enumerate_support")):
        return
    declared = "" if isinstance(p, Independent) or problems == 0 else f"batch_ndim={problems}"
    estimator = Enumerate(problems if declared else None)
    try:
        x = estimator.sample(p)
    except ScorefnError:
        return
    if isinstance(x, Tensor) and len(x) > n:
        found.left_out["Enumerate"] = _too_dear(f"the support has {len(x)} joint values", n)
        return
    yield Candidate(
        "Enumerate", estimator, f"sf.Enumerate({declared})(p, f)", "the support is small: no noise", exact=True
    )


def _coupled(found: Shortlist, n: int) -> Iterator[Candidate]:
    """Leave-one-out over blocks of draws that balance each other."""
    couplings = (
        (Antithetic(), "pairs cancel what is odd"),
        (Stratified(), "strata balance the draws in each coordinate"),
        (Sobol(), "low-discrepancy points balance the draws"),
        (OrthogonalGaussian(), "orthogonal directions"),
    )
    for coupling, reason in couplings:
        name = type(coupling).__name__
        if n < 4:
            found.left_out[name] = f"two blocks of two draws or more take 4 evaluations, and a gradient may cost {n}."
            continue
        yield Candidate(
            name,
            partial(expectation, num_samples=n, coupling=coupling),
            f"sf.expectation(p, f, {n}, coupling=sf.{name}())",
            reason,
        )


def _taylor(p: Any, f: Integrand, n: int) -> Iterator[Candidate]:
    unit = p
    while isinstance(unit, Independent):
        unit = unit.base_dist
    if not isinstance(unit, Normal | MultivariateNormal):
        return

    yield Candidate(
        "DeltaMethod",
        partial(expectation, num_samples=n - 1, control_variate=DeltaMethod(p, f, coefficient=1.0)),
        f"sf.expectation(p, f, {n - 1}, control_variate=sf.DeltaMethod(p, f, coefficient=1.0))",
        "the second-order expansion of f about the mean has a known expectation",
    )


def _linear(p: Any, n: int, problems: int) -> Iterator[Candidate]:
    """A linear model of f in x, where the draws are enough to fit it."""
    try:
        mean = p.mean
    except (NotImplementedError, AttributeError, RuntimeError):
        return
    if not isinstance(mean, Tensor) or not mean.requires_grad or not bool(mean.isfinite().all()):
        return
    size = mean.shape[problems:].numel()
    if mean.ndim > problems + 1 or size + 3 > n:
        return

    yield Candidate(
        "LinearControlVariate",
        partial(expectation, num_samples=n, control_variate=LinearControlVariate(lambda x: x, lambda: p.mean)),
        f"sf.expectation(p, f, {n}, control_variate=sf.LinearControlVariate(lambda x: x, lambda: p.mean))",
        "what is linear in x has a known expectation",
    )


def _pathwise(found: Shortlist, p: Any, n: int) -> Iterator[Candidate]:
    """The gradient of f along reparameterised draws."""
    if not getattr(p, "has_rsample", False):
        found.left_out["pathwise"] = f"{type(p).__name__} has no rsample."
        return

    def estimator(p: Distribution, f: Integrand) -> Tensor:
        value: Tensor = f(p.rsample(torch.Size((n,)))).mean(0)
        return value

    yield Candidate(
        "pathwise",
        estimator,
        f"f(p.rsample(torch.Size(({n},)))).mean(0)",
        "f is differentiable along the draws",
        pathwise=True,
    )


def _too_dear(what: str, n: int) -> str:
    return f"{what}, and a gradient may cost {n} evaluations."
