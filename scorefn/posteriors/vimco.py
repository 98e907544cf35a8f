"""VIMCO: the importance-weighted bound as a loss for Pyro's SVI, for guides of any kind."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from scorefn.core import Draws, NonFiniteError, ScorefnError, estimate
from scorefn.posteriors.checks import check_trainable, refuse_estimators
from scorefn.posteriors.doubly_reparameterized import PATH, DoublyReparameterized
from scorefn.posteriors.importance_weighted import (
    GeometricMean,
    WeightBaseline,
    check_weight_baseline,
    log_mean_weight,
    one_draw,
    without_each,
)
from scorefn.posteriors.particle_loss import ParticleLoss, once_differentiable
from scorefn.posteriors.particles import gather
from scorefn.posteriors.plates import Plates
from scorefn.posteriors.traces import Elements, Run, Site, Trace, read_run
from scorefn.reducers import Constant


class VIMCO(ParticleLoss):
    """The importance-weighted bound ``E[log 1/N sum_n w_n]``, ``w = p(x, z) / q(z)``, as a loss for ``pyro.infer.SVI``.

    With L the log of the mean weight, ``r_n = w_n / sum w`` and ``L_-n``, ``r_-n`` the same with w_n replaced by the
    geometric mean of the other weights, the gradient is::

        E[ sum_n (L - L_-n + r_-n) grad log q(decisions of n) + sum_n r_n grad log w_n ]

    Decisions are the guide sites that are not reparameterised; the others keep a pathwise gradient, doubly
    reparameterised where that holds. Published VIMCO (``BoundOnly``) has no ``r_-n``, which centres the score
    ``-r_n grad log q`` that log w_n carries: the estimate is then 0 where the bound is tight. For N = 1, ``L_-n`` = 0
    and ``r_-n`` = 1: the score function of the ELBO, without baseline.

    Inside plates that hold every latent, the bound is taken at each element and summed: a tighter bound, with the
    scale of a subsample outside the logarithm. Otherwise the whole program has one weight.

    A particle may have weight 0 (log p = -inf); all particles together may not.

    Sources: Burda, Grosse & Salakhutdinov (2016), "Importance weighted autoencoders"; Mnih & Rezende (2016),
    "Variational inference for Monte Carlo objectives"; Tucker, Lawson, Gu & Maddison (2019), "Doubly reparameterized
    gradient estimators for Monte Carlo objectives".

    Args:
        num_particles: N, at least 1.
        baseline: ``GeometricMean()``, ``ArithmeticMean()`` or ``BoundOnly(...)``; None: no baseline.
        pathwise: ``DoublyReparameterized()``; None: the ordinary gradient of log w.
        plates: "auto": the bound is per element of every plate that holds all guide sites and all factors after the
            first latent; names: of these plates, refused where they do not; (): one bound for the whole program, as
            it must be where plates exchange values although they declare not to.
        vectorize_particles: run the particles together, in an outermost plate; False where model or guide branch on a
            value. One after the other, they share their subsamples.
        max_plate_nesting: number of plate dimensions; guessed by one more run of model and guide if infinite. As an
            attribute, and in Pyro's messages, it counts the plate of the particles too.
        retain_graph: as in ``torch.autograd.backward``.
        strict_enumeration_warning: as in ``pyro.infer.ELBO``.

    Raises:
        ScorefnError: an argument that is out of range; from each method, as ``ScoreFunctionELBO``; for plates that do
            not hold all; or, from two particles on, for sites of one weight with different scales (a subsampled plate
            under global latents), which bound nothing.
        NonFiniteError: a weight is NaN or infinite, with site and particles named, or all weights of an element are 0.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> from scorefn.posteriors import VIMCO
        >>> def model():
        ...     z = pyro.sample("z", dist.Bernoulli(0.3))
        ...     pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.7))
        >>> def guide():
        ...     pyro.sample("z", dist.Bernoulli(logits=pyro.param("logit", torch.tensor(0.0))))
        >>> pyro.clear_param_store()
        >>> pyro.set_rng_seed(0)
        >>> optim = pyro.optim.SGD({"lr": 4.0})
        >>> svi = pyro.infer.SVI(model, guide, optim, loss=VIMCO(num_particles=2))
        >>> losses = [svi.step() for _ in range(20)]
        >>> round(pyro.param("logit").sigmoid().item(), 2)  # exactly .344
        0.34
    """

    def __init__(
        self,
        num_particles: int,
        *,
        baseline: WeightBaseline | None = GeometricMean(),  # noqa: B008
        pathwise: DoublyReparameterized | None = DoublyReparameterized(),  # noqa: B008
        plates: Collection[str] | Literal["auto"] = "auto",
        vectorize_particles: bool = True,
        max_plate_nesting: float = math.inf,
        retain_graph: bool | None = None,
        strict_enumeration_warning: bool = True,
    ) -> None:
        if baseline is not None:
            check_weight_baseline(baseline)
        if pathwise is not None and not isinstance(pathwise, DoublyReparameterized):
            raise ScorefnError(
                f"pathwise={pathwise!r} is no gradient of reparameterised sites: use DoublyReparameterized(), with "
                "parentheses, or None for the ordinary one."
            )
        if isinstance(plates, str) and plates != "auto":
            raise ScorefnError(
                f'plates={plates!r} must be names in a tuple, () or "auto": write plates=({plates!r},) for the plate '
                f'"{plates}".'
            )
        super().__init__(
            num_particles,
            vectorize_particles=vectorize_particles,
            max_plate_nesting=max_plate_nesting,
            retain_graph=retain_graph,
            strict_enumeration_warning=strict_enumeration_warning,
        )
        self.baseline = baseline
        self.pathwise = pathwise
        self.plates = plates

    def draws(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any) -> Draws:
        """N particles as one draw of the bound (its own sign), with the ordinary pathwise gradient.

        x: the guide's samples ``[1, N, ...]``; log_prob ``[1, B, N]``; fx ``[1, B, 1]``, whose sum over B is the bound.
        B counts the elements of the plates that hold every latent, and one more for factors before the first latent.

        Raises:
            ScorefnError: the guide has no site that is not reparameterised; or as the class says.
        """
        runs = self._runs(None, model, guide, args, kwargs)
        weights = self._weights(runs)
        if weights.log_prob is None:
            raise ScorefnError(
                "Every site of the guide is reparameterised, so there is no decision and no score. The loss itself "
                "needs no Draws: call differentiable_loss, or mark a site with fn.has_rsample_(False)."
            )
        samples = gather([run.read for run in runs]).samples
        check_trainable(_decisions(runs), weights.log_prob)
        with _naming_sites(runs):
            return one_draw(samples, weights.log_prob, weights.log_weight, weights.scale)

    def differentiable_loss(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """``-bound``, a scalar whose gradient is the estimate.

        Where a site is scored, or learnt along its path, it has no second derivative, and refuses one.

        Raises:
            ScorefnError: as the class says.
            NonFiniteError: a weight is NaN or infinite, or all weights of an element are 0.
        """
        pathwise = self.pathwise if torch.is_grad_enabled() else None
        runs = self._runs(pathwise, model, guide, args, kwargs)
        weights = self._weights(runs)
        scale, log_prob, log_weight = weights.scale, weights.log_prob, weights.log_weight
        learns = torch.is_grad_enabled()
        with _naming_sites(runs):
            if log_prob is None or not learns or (log_weight.requires_grad and not log_prob.requires_grad):
                bound = (scale * log_mean_weight(log_weight)).sum()
                without = share_without = torch.zeros_like(log_weight)
                if pathwise is None:
                    return -bound
            else:
                check_trainable(_decisions(runs), log_prob)
                draws = one_draw({}, log_prob, log_weight, scale)
                without, share_without = without_each(log_weight, self.baseline)
                bound = estimate(draws, None, Constant((scale * (without - share_without)).T)).sum()
        if pathwise is None:
            return once_differentiable(-bound)
        return once_differentiable(-bound - self._path_term(pathwise, runs, weights, without, share_without))

    def _path_term(
        self,
        pathwise: DoublyReparameterized,
        runs: list[_Run],
        weights: _Weights,
        without: Tensor,
        share_without: Tensor,
    ) -> Tensor | float:
        """The doubly reparameterised part: value 0, and the gradient along the paths that were cut."""
        log_weight = weights.log_weight.detach()
        share = log_weight.softmax(0)
        signal = log_mean_weight(log_weight) - share - without + share_without + share_without.square()
        term: Tensor | float = 0.0
        start = 0
        for run in runs:
            if pathwise.paths(run.guide_trace):
                rows = slice(start, start + run.together)
                log_prob, full = run.sums(weights.plates, self._linear, keep_paths=True)
                objective = (weights.scale * share[rows].square() * weights.padded(full)).sum()
                if log_prob is not None:
                    objective = objective + (weights.scale * signal[rows] * weights.padded(log_prob)).sum()
                term = term + pathwise.term(objective, run.guide_trace)
            start += run.together
        return term

    @property
    def _linear(self) -> bool:
        """Whether the bound is linear in the factors, as the ELBO is: scales may then differ."""
        return int(self.num_particles) == 1

    def _runs(
        self,
        pathwise: DoublyReparameterized | None,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> list[_Run]:
        with nullcontext() if pathwise is None else pathwise.handler():
            pairs = self.trace_pairs(model, guide, args, kwargs)
        for _, guide_trace in pairs:
            refuse_estimators(guide_trace)
        together = self.num_together
        return [_Run(read_run(*pair, together), *pair, together) for pair in pairs]

    def _weights(self, runs: list[_Run]) -> _Weights:
        plates = self._separate([run.read for run in runs])
        rows = [run.sums(plates, self._linear) for run in runs]
        log_weight = torch.cat([row for _, row in rows])
        log_prob = None
        if any(score is not None for score, _ in rows):
            log_prob = torch.cat([torch.zeros_like(row) if score is None else score for score, row in rows])
            dtype = torch.promote_types(log_prob.dtype, log_weight.dtype)
            log_prob, log_weight = log_prob.to(dtype), log_weight.to(dtype)
        scale = torch.ones_like(log_weight[0]) if self._linear else _common_scale(runs, plates, log_weight[0])
        if any(run.read.constants for run in runs):
            before = torch.cat([run.constants() for run in runs]).to(log_weight)
            log_weight = torch.cat([log_weight, before], 1)
            scale = torch.cat([scale, scale.new_ones(1)])
            if log_prob is not None:
                log_prob = torch.cat([log_prob, torch.zeros_like(before)], 1)
        return _Weights(plates, log_prob, log_weight, scale)

    def _separate(self, runs: list[Run]) -> Plates:
        """The plates whose elements have weights of their own."""
        inside = [(name, plates) for run in runs for name, plates in _held(run)]
        common = frozenset[Any]() if not inside else frozenset.intersection(*(plates for _, plates in inside))
        if self.plates == "auto":
            return common
        for wanted in self.plates:
            if wanted not in {plate.name for plate in common}:
                outside = next((name for name, plates in inside if wanted not in {p.name for p in plates}), "?")
                raise ScorefnError(
                    f'The bound cannot be taken at each element of the plate "{wanted}", because site "{outside}" is '
                    "outside of it or has another one in model and guide: all elements share its weight. Move it into "
                    "the plate (or, where it is observed, before the first latent), or leave the plate out of plates."
                )
        return frozenset(plate for plate in common if plate.name in self.plates)


@dataclass(frozen=True)
class _Weights:
    """Weights of all particles at B problems.

    Args:
        plates: whose elements are the problems.
        log_prob: ``[N, B]`` of each particle's decisions, or None without a decision.
        log_weight: ``[N, B]``.
        scale: ``[B]``, of each problem's bound.
    """

    plates: Plates
    log_prob: Tensor | None
    log_weight: Tensor
    scale: Tensor

    def padded(self, row: Tensor) -> Tensor:
        """``[n, B]``, with a zero for the factors before the first latent, where there are any."""
        return torch.nn.functional.pad(row, (0, self.scale.numel() - row.shape[1])).to(self.log_weight)


@dataclass(frozen=True)
class _Run:
    """A pair of traces, and what was read from it."""

    read: Run
    model_trace: Trace
    guide_trace: Trace
    together: int

    def site(self, elements: Elements) -> Site:
        """Where the elements come from."""
        kind, name, _ = elements.key
        return (self.guide_trace if kind == "log q" else self.model_trace).nodes[name]

    def factors(self) -> Iterator[Elements]:
        """Every factor that a draw can reach."""
        return (value for stage in self.read.stages for value in stage.values)

    def sums(self, plates: Plates, linear: bool, *, keep_paths: bool = False) -> tuple[Tensor | None, Tensor]:
        """Log-probability of the decisions and log weight, ``[n, B]`` each.

        Args:
            plates: whose elements are the problems.
            linear: scale each factor; otherwise the scale is the bound's.
            keep_paths: whether the log q of a site that was cut is differentiated.
        """
        log_weight = log_prob = torch.zeros(())
        for elements in self.factors():
            site = self.site(elements)
            value = scale_and_mask(site["unscaled_log_prob"], site["scale"] if linear else 1.0, site["mask"])
            if elements.key[0] == "log q":
                value = -(value if keep_paths or PATH not in site else value.detach())
            log_weight = log_weight + _at_each(value.reshape(elements.value.shape), plates)
        for stage in self.read.stages:
            if stage.decision is not None:
                log_prob = log_prob + _at_each(stage.decision.value, plates)
        log_weight = log_weight if log_weight.ndim else log_weight.expand(self.together, 1)
        return (log_prob if log_prob.ndim else None), log_weight

    def constants(self) -> Tensor:
        """``[n, 1]``: factors before the first latent, the same for all particles: they need no weight."""
        total = torch.zeros(())
        for value in self.read.constants:
            total = total + _at_each(value.value, frozenset())
        return total.expand(self.together, 1)


def _decisions(runs: list[_Run]) -> Iterator[str]:
    """Names of the sites that are scored."""
    return (s.decision.key[1] for run in runs for s in run.read.stages if s.decision is not None)


@contextmanager
def _naming_sites(runs: list[_Run]) -> Iterator[None]:
    """Say which site made a weight, or a score, that is NaN or infinite; -inf alone is weight 0."""
    try:
        yield
    except NonFiniteError as error:
        particles = gather([run.read for run in runs])
        possible = torch.where(particles.fx == -torch.inf, 0.0, particles.fx)
        raise replace(particles, fx=possible).not_finite() or error from None


def _at_each(value: Tensor, plates: Plates) -> Tensor:
    """``[n, *shape] -> [n, B]``: summed over the dimensions of no plate."""
    kept = {plate.dim for plate in plates}
    summed = [dim for dim in range(1 - value.ndim, 0) if dim not in kept]
    return (value.sum(summed, keepdim=True) if summed else value).reshape(len(value), -1)


def _held(run: Run) -> Iterator[tuple[str, Plates]]:
    """Each site, with the plates that hold it."""
    for stage in run.stages:
        for elements in (*stage.values, *([] if stage.decision is None else [stage.decision])):
            yield elements.key[1], elements.plates & stage.plates if elements.key[0] != "log p" else elements.plates


def _common_scale(runs: list[_Run], plates: Plates, like: Tensor) -> Tensor:
    """The scale of each problem, ``[B]``; refused where its sites differ."""
    found = [(elements, run.site(elements)["scale"]) for run in runs for elements in run.factors()]
    if not found:
        return torch.ones_like(like)
    name, first = found[0][0].key[1], found[0][1]
    if all(isinstance(scale, int | float) and scale == first for _, scale in found):
        return torch.full_like(like, float(first))
    kept = {plate.dim for plate in plates}
    common: Tensor | None = None
    for elements, given in found:
        scale = chosen = torch.as_tensor(given).to(like).expand(elements.value.shape[1:]).unsqueeze(0)
        for dim in range(1 - scale.ndim, 0):
            if dim not in kept:
                chosen = chosen.narrow(dim, 0, 1)
        common = chosen.reshape(-1) if common is None else common
        if not bool((scale == chosen).all()) or not torch.equal(chosen.reshape(-1), common):
            raise ScorefnError(
                f'Sites of one importance weight have different scales, such as {_shown(first)} ("{name}") and '
                f'{_shown(given)} ("{elements.key[1]}"), but the log of a mean of weights is not linear in them, so '
                "that a subsample, or a scale on some sites, gives a bound of nothing. Keep every latent inside the "
                "subsampled plate, use all the data, or use one particle (or ScoreFunctionELBO)."
            )
    return torch.ones_like(like) if common is None else common


def _shown(scale: Any) -> str:
    return f"{float(scale):.4g}" if isinstance(scale, int | float) or scale.numel() == 1 else f"{tuple(scale.shape)}"
