"""How good a fit is: bound, k-hat, evidence, noise of each site, and the particles that it should take."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any, TypeAlias

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor

from scorefn.core import Baseline, Draws, ScorefnError, check_count, surrogate
from scorefn.diagnostics.allocation import Allocation, allocate
from scorefn.posteriors.pareto import LEAST_DRAWS, PSIS, draws_needed, psis
from scorefn.posteriors.score_function_elbo import ScoreFunctionELBO
from scorefn.posteriors.site_noise import SignalToNoise, signal_to_noise, site_gradients
from scorefn.posteriors.subsamples import SharedSubsamples
from scorefn.posteriors.weights import Bound, Evidence, bound, evidence, gap

Program: TypeAlias = Callable[..., Any]
TOGETHER = 64
"""Particles that run together at least where only their weights are wanted."""


@dataclass(frozen=True, eq=False)
class FitReport:
    """What ``diagnose`` found; ``print`` shows a table.

    Attributes:
        bound: the ELBO.
        psis: k-hat and smoothed weights; None where a site is scaled (``scaled``), as then exp(log p - log q) is no
            importance weight.
        evidence: importance-corrected, from the smoothed weights; None as above.
        gap: evidence less bound, the divergence KL(guide, posterior), with the standard error of the difference on the
            same draws (delta method); None as above.
        sites: signal-to-noise of the score-function gradient of each guide site, at ``num_particles``.
        total: that of the whole gradient.
        allocation: where noise and cost come from, with the recommended number of particles.
        num_particles: of the loss.
        num_draws: behind bound, k-hat and evidence.
        scaled: sites that are subsampled or scaled.
        seconds: CPU seconds that the report took.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> from scorefn.posteriors import ScoreFunctionELBO, diagnose
        >>> def model():
        ...     z = pyro.sample("z", dist.Bernoulli(0.3))
        ...     pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.7))
        >>> def guide():  # the posterior: log(.3/.7) + .7 - 1/2 = -.6473
        ...     pyro.sample("z", dist.Bernoulli(logits=pyro.param("logit", torch.tensor(-0.6473))))
        >>> pyro.clear_param_store()
        >>> report = diagnose(ScoreFunctionELBO(4), model, guide, num_draws=50, repeats=2)
        >>> report.verdict
        'below 0.41: importance sampling corrects this guide'
        >>> (
        ...     round(report.bound.value.item(), 3),
        ...     round(report.evidence.value.item(), 3),
        ... )  # the bound is tight
        (-1.1, -1.1)
        >>> [row.split()[0] for row in str(report).splitlines()]  # print(report) shows the table
        ['ELBO', 'log', 'gap', 'k-hat', 'gradient', 'z', 'particles']
    """

    bound: Bound
    psis: PSIS | None
    evidence: Evidence | None
    gap: Bound | None
    sites: Mapping[str, SignalToNoise]
    total: SignalToNoise
    allocation: Allocation
    num_particles: int
    num_draws: int
    scaled: tuple[str, ...]
    seconds: float

    @property
    def verdict(self) -> str:
        """What k-hat says, in a sentence, and how many draws have weight 0, which it does not see."""
        if self.psis is None:
            names = ", ".join(self.scaled[:3]) + (", ..." if len(self.scaled) > 3 else "")
            return f"not measured, as sites are subsampled or scaled ({names}): give args with all data, unscaled"
        zero = int((self.psis.log_weights == -torch.inf).sum())
        if not zero:
            return self._of_the_tail(self.psis)
        return (
            f"{self._of_the_tail(self.psis)}; {zero} of {len(self.psis.log_weights)} draws have weight 0 (log p is "
            "-inf), which k-hat does not count: keep the guide inside the model's support"
        )

    @staticmethod
    def _of_the_tail(psis: PSIS) -> str:
        k, threshold = float(psis.k), psis.threshold
        if k < threshold:
            return f"below {threshold:.2f}: importance sampling corrects this guide"
        if k < 1:
            return (
                f"not below {threshold:.2f}: the guide misses a tail of the posterior, and the evidence may be far "
                f"off; {draws_needed(k):.1e} draws would be needed"
            )
        return "1 or more: the weights have no mean, and the guide cannot be corrected"

    def __repr__(self) -> str:
        """A table."""
        rows = [("ELBO", f"{float(self.bound.value):.4f} +- {float(self.bound.standard_error):.4f}")]
        if self.psis is not None and self.evidence is not None and self.gap is not None:
            value, error = float(self.evidence.value), float(self.evidence.standard_error)
            size = float(self.evidence.effective_sample_size)
            rows.append(("log evidence", f"{value:.4f} +- {error:.4f}   (ESS {size:.0f} of {self.num_draws} draws)"))
            short, error = float(self.gap.value), float(self.gap.standard_error)
            rows.append(("gap", f"{short:.4f} +- {error:.4f}   (evidence less ELBO, on the same draws)"))
            k = float(self.psis.k)
            tail = "many draws share the largest weight" if k == -math.inf else "negative: the weights are bounded"
            rows.append(("k-hat", f"{k:.2f}   {self.verdict}" + (f" ({tail})" if k < 0 else "")))
        else:
            rows.append(("k-hat", self.verdict))
        silent = ", 0: no signal above the noise, as at an optimum" if self.total.ratio == 0 else ""
        rows.append(("gradient SNR", f"{self.total.ratio:.3g}   (at {self.num_particles} particles{silent})"))
        rows += [(f"  {name}", f"{found.ratio:.3g}") for name, found in self.sites.items()]
        plan = self.allocation
        share = plan.between / total if (total := plan.variance(self.num_particles)) > 0 else 0.0
        without = "half of the cost; K* is infinite without noise between minibatches"
        optimum = f"K* {plan.optimum:.3g}" if plan.between > 0 else without
        saved = plan.price(self.num_particles) / least if (least := plan.price(plan.num_particles)) > 0 else 1.0
        rows.append(
            (
                "particles",
                f"{plan.num_particles} recommended ({optimum}; {share:.0%} of the variance is between minibatches); "
                f"{self.num_particles} cost {saved:.2f} times as much per precision",
            )
        )
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def diagnose(
    loss: ScoreFunctionELBO,
    model: Program,
    guide: Program,
    args: tuple[Any, ...] = (),
    *,
    batches: Sequence[tuple[Any, ...]] = (),
    num_draws: int = 1000,
    repeats: int = 32,
) -> FitReport:
    """Judge a fit: how tight the bound is, whether the guide covers the posterior, and where the noise comes from.

    Parameters, their ``.grad``, and the loss with its baseline stay as they are; random numbers are used up.

    Args:
        loss: as it trains: its particles, credit and baseline are those whose noise is measured.
        model: as in ``SVI``; bind keyword arguments with ``functools.partial``.
        guide: as in ``SVI``.
        args: what model and guide take: for ELBO, k-hat and evidence, all data.
        batches: such arguments as the training meets them, for the noise, taken in turns; none: ``args`` each time.
            Plates that subsample by themselves need nothing here.
        num_draws: S, particles behind ELBO, k-hat and evidence.
        repeats: independent gradient estimates, and minibatches; at least 2.

    Raises:
        ScorefnError: too few draws or repeats, nothing to train, or as the loss.
        NonFiniteError: as ``psis`` and the loss.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> from scorefn.posteriors import ScoreFunctionELBO, diagnose
        >>> def model():
        ...     z = pyro.sample("z", dist.Bernoulli(0.3))
        ...     pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.7))
        >>> def guide():
        ...     pyro.sample("z", dist.Bernoulli(logits=pyro.param("logit", torch.tensor(-0.6))))
        >>> pyro.clear_param_store()
        >>> found = diagnose(ScoreFunctionELBO(4), model, guide, num_draws=500, repeats=2)
        >>> abs(found.evidence.value.item() + 1.10) < 0.01  # exactly -1.0996
        True
        >>> list(found.sites)
        ['z']
    """
    start = time.process_time()
    if check_count("repeats", repeats) < 2:
        raise ScorefnError("repeats must be at least 2: one gradient says nothing about its own noise.")
    if check_count("num_draws", num_draws) < LEAST_DRAWS:
        raise ScorefnError(f"num_draws must be at least {LEAST_DRAWS} for k-hat, but it is {num_draws}.")
    fit = _Fit(loss, model, guide, args)
    log_weights, scaled = fit.log_weights(args, num_draws)
    met = [_Minibatch(batch) for batch in islice(cycle(batches or [args]), repeats)]
    sites, total = fit.site_noise(met)
    fresh = bool(batches) or any(batch.subsamples.drawn for batch in met)
    allocation = allocate(
        fit.surrogate,
        fit.params,
        met if fresh else met[:1],
        num_particles=loss.num_particles,
        repeats=2 if fresh else 2 * repeats,
    )
    smoothed = None if scaled else psis(log_weights)
    return FitReport(
        bound=bound(log_weights),
        psis=smoothed,
        evidence=None if smoothed is None else evidence(smoothed.log_weights),
        gap=None if smoothed is None else gap(log_weights, smoothed.log_weights),
        sites=sites,
        total=total,
        allocation=allocation,
        num_particles=loss.num_particles,
        num_draws=num_draws,
        scaled=scaled,
        seconds=time.process_time() - start,
    )


class _Watch(Messenger):  # type: ignore[misc]
    """Notes the sites whose log-probabilities are scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.scaled: dict[str, None] = {}

    def _pyro_post_sample(self, msg: Any) -> None:
        if type(msg["fn"]).__name__ != "_Subsample" and bool((torch.as_tensor(msg["scale"]) != 1).any()):
            self.scaled[msg["name"]] = None


class _Minibatch:
    """The arguments of one step, and what its plates subsampled first, which they subsample again."""

    def __init__(self, args: tuple[Any, ...]) -> None:
        self.args = args
        self.subsamples = SharedSubsamples()


class _Fit:
    """Copies of the loss that leave the user's own alone, and what they are asked."""

    def __init__(self, loss: ScoreFunctionELBO, model: Program, guide: Program, args: tuple[Any, ...]) -> None:
        if not isinstance(loss, ScoreFunctionELBO):
            raise ScorefnError(
                f"loss is a {type(loss).__name__}, but the noise of sites is read from a ScoreFunctionELBO. For "
                "another loss, take psis, evidence and allocate, which need tensors only."
            )
        self.model, self.guide = model, guide
        self.loss = _copied(loss, loss.num_particles)
        self.losses = {loss.num_particles: self.loss}
        with poutine.trace(param_only=True) as capture:
            self.loss.loss(model, guide, *args)  # also settles max_plate_nesting, once for all copies
        leaves = {id(leaf): leaf for site in capture.trace.nodes.values() for leaf in [site["value"].unconstrained()]}
        self.params = [leaf for leaf in leaves.values() if leaf.requires_grad]
        if not self.params:
            raise ScorefnError(
                "Neither model nor guide has a parameter that requires grad, so there is no gradient to judge. For the "
                "weights alone, take psis and evidence."
            )

    def with_particles(self, number: int) -> ScoreFunctionELBO:
        """The loss with so many particles."""
        if number not in self.losses:
            self.losses[number] = _copied(self.loss, number)
        return self.losses[number]

    @torch.no_grad()
    def log_weights(self, args: tuple[Any, ...], num_draws: int) -> tuple[Tensor, tuple[str, ...]]:
        """log p - log q ``[S]``, and the names of sites whose log-probabilities are scaled."""
        loss = self.with_particles(min(num_draws, max(self.loss.num_particles, TOGETHER)))
        found, missing = list[Tensor](), num_draws
        with _Watch() as watch:
            while missing > 0:
                found.append(loss._particles(self.model, self.guide, args, {}).fx.sum(-1)[:missing])
                missing -= len(found[-1])
        return torch.cat(found), tuple(watch.scaled)

    def surrogate(self, batch: _Minibatch, number: int) -> Tensor:
        """The bound on a minibatch, with its estimated gradient; no baseline learns from it."""
        return self._estimate(batch, number)[0]

    def site_noise(self, batches: Sequence[_Minibatch]) -> tuple[dict[str, SignalToNoise], SignalToNoise]:
        """Signal and noise of each site that is a decision, and of the whole gradient, over minibatches."""
        rows, totals = list[dict[str, Tensor]](), list[Tensor]()
        for batch in batches:
            value, draws, baseline, columns = self._estimate(batch, self.loss.num_particles)
            rows.append({})
            if draws is not None:
                credit = self.loss.credit
                rows[-1] = site_gradients(draws, columns, self.params, credit=credit, baseline=baseline)
            parts = torch.autograd.grad(value, self.params, allow_unused=True, materialize_grads=True)
            totals.append(torch.cat([part.reshape(-1) for part in parts]))
        nothing = torch.zeros_like(totals[0])  # what a site contributes that no particle has visited
        names = dict.fromkeys(name for row in rows for name in row)
        sites = {name: signal_to_noise(torch.stack([row.get(name, nothing) for row in rows])) for name in names}
        return sites, signal_to_noise(torch.stack(totals))

    def _estimate(
        self, batch: _Minibatch, number: int
    ) -> tuple[Tensor, Draws | None, Baseline | None, dict[str, Tensor]]:
        """The bound; where there are decisions, also the draws, their baseline and the columns of each site."""
        loss = self.with_particles(number)
        with batch.subsamples:
            particles = loss._particles(self.model, self.guide, batch.args, {})
        if particles.pathwise:
            return particles.fx.sum(-1).mean(), None, None, {}
        draws, baseline = particles.draws(), loss._baseline(particles)
        columns = dict[str, list[int]]()
        for (_, name, _), start, size in particles.decisions:  # a site whose shape varies has several
            columns.setdefault(name, []).extend(range(start, start + size))
        device = draws.log_prob.device
        index = {name: torch.tensor(own, device=device) for name, own in columns.items()}
        return surrogate(draws, credit=loss.credit, baseline=baseline).mean(), draws, baseline, index


def _copied(loss: ScoreFunctionELBO, num_particles: int) -> ScoreFunctionELBO:
    """The same loss with a baseline of its own, each particle drawn apart."""
    twin = copy.copy(loss)
    twin.num_particles, twin.jointly = num_particles, False
    twin.baseline, twin.coefficients = copy.deepcopy((loss.baseline, loss.coefficients))
    return twin
