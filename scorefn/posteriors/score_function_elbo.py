"""ScoreFunctionELBO: a loss for Pyro's SVI whose gradient is right for discrete and black-box guides."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from scorefn.core import Baseline, Credit, Draws, LeaveOneOut, ScorefnError, check_count, estimate
from scorefn.core.checks import no_part
from scorefn.estimators.estimator import Estimator
from scorefn.posteriors.coefficients import SiteRaoBlackwell
from scorefn.posteriors.dependencies import TrackedDependencies
from scorefn.posteriors.hints import Hinted, HintReader, refuse_shared
from scorefn.posteriors.joint_sites import JointReader, ParticlePlate, check_estimators, estimate_jointly
from scorefn.posteriors.particle_loss import ParticleLoss, once_differentiable
from scorefn.posteriors.particles import Particles, gather
from scorefn.posteriors.recording import recorded
from scorefn.posteriors.traces import PARTICLES, Trace, read_run
from scorefn.reducers import AdaptiveRaoBlackwell, OptimalConstant, RegressionBaseline

_OF_OTHERS = LeaveOneOut, AdaptiveRaoBlackwell, OptimalConstant, RegressionBaseline  # made from other particles


class ScoreFunctionELBO(ParticleLoss):
    """The evidence lower bound by the score function, as a loss for ``pyro.infer.SVI``.

    With f_j every element of log p of a model site and of -log q of a guide site, M the influence of decisions on
    values (``PlateCredit``) and b_k a baseline::

        grad ELBO = E[ sum_k (sum_j M_kj f_j - b_k) grad log q_k + sum_j grad f_j ]

    k runs over the elements of guide sites that are not reparameterised; the others keep their pathwise gradient, the
    second sum, as do the model's parameters. A site that is partly reparameterised (a rejection sampler) has both: its
    score is of the noise that was accepted. Subsampling scales and masks enter f, never the score. Unlike a loss that
    follows values through the tensor graph, it stays right where model or guide branch on a value (``if z:``).

    With two particles or more the default baseline is adaptive Rao-Blackwellisation: leave-one-out, with the values
    that a site does not influence as a control variate for it, by a coefficient that the site has learnt in past
    steps. It belongs to the site's name, so use one loss for one program.

    A site's own ``infer={"baseline": {...}}`` is read as Pyro reads it and takes the place of ``baseline`` at that
    site: ``nn_baseline`` of the detached ``nn_baseline_input``, or ``baseline_value``, fitted by a squared error that
    is part of the loss's gradient, never of its value; and ``use_decaying_avg_baseline``, with ``baseline_beta`` (.9),
    kept as the param ``__baseline_avg_downstream_cost_<site>`` and read before it is moved. Its shape is the site's
    plate elements, for all particles, or with the particles first. It is evaluated before the site is sampled, so that
    it cannot know the value. Unlike Pyro's, one average serves all particles, moved by their mean.

    A site with an estimator, in ``estimators`` by its name or in its own ``infer={"estimator": scorefn.DisARM(4)}``,
    has its N particles drawn together by ``estimator.sample(p)``, and its score is replaced by that of
    ``estimator.surrogate(p, x, f)`` with f the cost that the site influences, plate element by plate element: batch
    dimensions are problems of their own, ``to_event`` makes one joint draw. The distribution must be the same for all
    particles: made of data and parameters, not of sites before it. Given the joint draws the particles are independent,
    so other sites keep their baseline, which leaves out its own particle only. Where draws count by weights w, each
    element has them in an order of its own, and a value is weighed by the product of ``N w`` over the elements that
    influence it: right for every term, without variance where elements do not meet in one value
    (``Enumerate`` in a plate of local latents), and with a variance that grows by each element that does. ``draws``
    refuses such a site, and ``diagnose`` draws each particle apart.

    Sources: Naesseth, Ruiz, Linderman & Blei (2017), "Reparameterization gradients through acceptance-rejection
    sampling algorithms", for rejection samplers; Ranganath, Gerrish & Blei (2014), "Black box
    variational inference"; Schulman, Heess, Weber & Abbeel (2015), "Gradient estimation using stochastic computation
    graphs"; Mnih & Rezende (2016), "Variational inference for Monte Carlo objectives", and Kool, van Hoof & Welling
    (2019) for leave-one-out.

    Args:
        num_particles: N, at least 1.
        vectorize_particles: run the particles together, in an outermost plate; False where model or guide branch on a
            value. In both cases the particles of one step meet the same subsamples.
        max_plate_nesting: number of plate dimensions; guessed by one more run of model and guide if infinite. As an
            attribute, and in Pyro's messages, it counts the plate of the particles too.
        baseline: "auto" is adaptive Rao-Blackwellisation from two particles on, otherwise none. One with a state is
            updated afterwards, and never without gradient.
        estimators: by the names of guide sites; their particles run together, and num_particles is the number of their
            draws. Those that ask for the gradient of f, or for f at points that are no draws, are refused.
        credit: None: program order and plates; ``Total()`` where plates exchange values although they declare not to.
        dependencies: "order": a site is charged with what comes after it, in its own plate indices. "tracked": only
            with what depends on it, by ``scorefn.tracking``: sharper where branches are independent, found by extra
            runs of model and guide, which must leave no state behind, and audited. Where a value leaves the tensor
            graph, or an audit refutes the tracking, it is program order again, with one warning.
        audit_every: steps between audits of tracked dependencies, after a few early ones; see
            ``docs/limitations.md`` for what may change between two of them.
        retain_graph: as in ``torch.autograd.backward``.
        strict_enumeration_warning: as in ``pyro.infer.ELBO``.

    Raises:
        ScorefnError: an argument that is out of range, or a baseline made from other particles where there is one; from
            each method, for what would be wrong silently: enumerated sites, sites that guide or model lacks, a hint
            with an unknown or a missing option, a baseline that knows its own site or shares a parameter with the
            bound, an estimator of a site that depends on the particle, of another number of draws, of a family that it
            does not serve, or of no site at all; or for a log q without gradient.
        ShapeError: plates of guide and model contradict, or a site's baseline is of another shape.
        SupportError: a guide site samples outside the model's support, is discrete where the model is continuous or the
            reverse, or has a support that moves with a parameter.
        NonFiniteError: log p or log q is NaN or infinite, with site and particles named.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> from scorefn.posteriors import ScoreFunctionELBO
        >>> def model():
        ...     z = pyro.sample("z", dist.Bernoulli(0.3))
        ...     pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.7))
        >>> def guide():
        ...     pyro.sample("z", dist.Bernoulli(logits=pyro.param("logit", torch.tensor(0.0))))
        >>> pyro.clear_param_store()
        >>> pyro.set_rng_seed(0)
        >>> optim = pyro.optim.SGD({"lr": 4.0})
        >>> svi = pyro.infer.SVI(model, guide, optim, loss=ScoreFunctionELBO(num_particles=1000))
        >>> losses = [svi.step() for _ in range(4)]
        >>> round(pyro.param("logit").sigmoid().item(), 2)  # exactly .344
        0.34
    """

    def __init__(
        self,
        num_particles: int = 1,
        *,
        vectorize_particles: bool = True,
        max_plate_nesting: float = math.inf,
        baseline: Baseline | Literal["auto"] | None = "auto",
        estimators: Mapping[str, Estimator] | None = None,
        credit: Credit | None = None,
        dependencies: Literal["order", "tracked"] = "order",
        audit_every: int = 1000,
        retain_graph: bool | None = None,
        strict_enumeration_warning: bool = True,
    ) -> None:
        super().__init__(
            num_particles,
            vectorize_particles=vectorize_particles,
            max_plate_nesting=max_plate_nesting,
            retain_graph=retain_graph,
            strict_enumeration_warning=strict_enumeration_warning,
        )
        if isinstance(baseline, str) and baseline != "auto":
            raise ScorefnError(f'baseline must be a baseline object, None or "auto", but it is {baseline!r}.')
        alone = self.num_particles == 1 and getattr(baseline, "process_group", None) is None
        if isinstance(baseline, _OF_OTHERS) and alone:
            raise ScorefnError(
                f"The {type(baseline).__name__} of a particle is made from the others, but num_particles is 1, so "
                'there is none. Raise num_particles to at least 2, or use another baseline, such as "auto" or None.'
            )
        if credit is not None and not isinstance(credit, Credit):
            raise no_part("credit", credit, "use Total(), or None for program order and plates.")
        self._audit_every = check_count("audit_every", audit_every)
        self.baseline = baseline
        self.estimators = check_estimators(estimators)
        self.jointly = True  # whether estimators of sites are used; ``diagnose`` draws each particle apart
        self.credit = credit
        if dependencies not in ("order", "tracked"):
            raise ScorefnError(
                f'dependencies must be "order" (program order and plates) or "tracked", but it is {dependencies!r}.'
            )
        self.dependencies = TrackedDependencies(audit_every) if dependencies == "tracked" else None
        self.coefficients = SiteRaoBlackwell()  # of "auto"
        self._plate: tuple[tuple[int, float], ParticlePlate] | None = None  # of the particles, and what it was made for
        self._audited: set[tuple[str, int]] = set()  # hints that were seen not to know their site
        self._apart: set[str] = set()  # sites whose hints were seen to share no parameter with the bound

    def _setting(self, name: str, default: Any) -> Any:
        """Of those that are kept in another form, too."""
        if name == "dependencies":
            return "order" if self.dependencies is None else "tracked"
        if name == "audit_every":
            return self._audit_every
        if name == "estimators":
            return self.estimators or None
        return super()._setting(name, default)

    def draws(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any) -> Draws:
        """N particles as Draws of the ELBO (its own sign): x the guide's samples, log_prob ``[N, K]``, fx ``[N, J]``.

        K counts the elements of guide sites that are not reparameterised, J those of log p of every model site and of
        -log q of every guide site; ``credit`` is the particles' ``PlateCredit``.

        Raises:
            ScorefnError: the guide has no such site, or one with an estimator; or as the class says.
        """
        return self._particles(model, guide, args, kwargs).draws()

    def differentiable_loss(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """``-ELBO``, a scalar whose gradient is the estimate.

        It has a first derivative only where a site is scored, and refuses a second one: ``dice(loss.draws(...))`` has
        every derivative.

        Raises:
            ScorefnError: as the class says.
            NonFiniteError: log p or log q is NaN or infinite, with site and particles named.
        """
        particles = self._particles(model, guide, args, kwargs, 1)
        if particles.pathwise and not particles.joint:
            log_ratio = particles.fx.sum(-1)
            if not bool(torch.isfinite(log_ratio.detach()).all()) and (refusal := particles.not_finite()) is not None:
                raise refusal
            return -log_ratio.mean(0)
        if particles.joint:
            baseline = self._baseline(particles)
            loss = -estimate_jointly(particles, self.credit, baseline)
        else:
            draws, baseline = particles.draws(), self._baseline(particles)
            loss = -estimate(draws, self.credit, baseline)
        if isinstance(baseline, Hinted) and (error := baseline.squared_error) is not None:
            loss = loss + (error - error.detach())
        return once_differentiable(loss)

    def _baseline(self, particles: Particles) -> Baseline | None:
        """What is subtracted: the loss's own baseline, and at hinted sites theirs."""
        baseline = None if isinstance(self.baseline, str) else self.baseline
        if not torch.is_grad_enabled():
            return baseline
        if isinstance(self.baseline, str) and self.num_particles > 1:
            baseline = self.coefficients.of(particles.decisions, particles.fx.device)
        if not particles.hints:
            return baseline
        if new := {hint.site for hint in particles.hints} - self._apart:
            refuse_shared(particles.hints, (particles.fx, particles.log_prob))
            self._apart |= new
        return Hinted(particles.hints, baseline)

    def _particles(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        order: int | None = None,
    ) -> Particles:
        pairs = self.trace_pairs(model, guide, args, kwargs)
        together = self.num_together
        runs = [read_run(model_trace, guide_trace, together, order) for model_trace, guide_trace in pairs]
        if self.dependencies is not None and torch.is_grad_enabled():
            program = model, guide
            if together > 1:
                program = self._vectorized_num_particles(model), self._vectorized_num_particles(guide)
            runs = self.dependencies.applied(model, guide, args, kwargs, pairs, runs, program)
        return gather(runs)

    def _vectorized_num_particles(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """The plate of the particles around model or guide, made once."""
        if self.num_particles == 1:
            return fn
        wanted = self.num_particles, self.max_plate_nesting
        if self._plate is None or self._plate[0] != wanted:
            self._plate = wanted, ParticlePlate(PARTICLES, self.num_particles, dim=-int(self.max_plate_nesting))
        wrapped: Callable[..., Any] = self._plate[1](fn)
        return wrapped

    def _get_trace(
        self, model: Callable[..., Any], guide: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Trace, Trace]:
        """One run, in which the guide's own baselines are read, and the draws of its estimators made."""
        reader = HintReader(self._audited)
        estimators = JointReader(self.estimators, self.num_particles, self.num_together, reader)
        before = estimators if self.jointly else reader
        model_trace, guide_trace = recorded(model, guide, args, kwargs, self.max_plate_nesting, before)
        if reader.hints:
            reader.close(guide_trace.nodes)
        if self.jointly:
            estimators.close()
        return model_trace, guide_trace
