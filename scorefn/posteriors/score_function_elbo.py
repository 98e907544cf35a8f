"""ScoreFunctionELBO: a loss for Pyro's SVI whose gradient is right for discrete and black-box guides."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from pyro.infer import ELBO
from pyro.infer.enum import get_importance_trace
from torch import Tensor

from scorefn.core import (
    Baseline,
    Credit,
    Draws,
    NonFiniteError,
    ScorefnError,
    check_count,
    estimate,
)
from scorefn.posteriors.traces import Particles, Trace, gather, read_run


class ScoreFunctionELBO(ELBO):  # type: ignore[misc]
    """The evidence lower bound by the score function, as a loss for ``pyro.infer.SVI``.

    With f_j every element of log p of a model site and of -log q of a guide site, M the influence of decisions on
    values (``PlateCredit``) and b_k leave-one-out over the N particles::

        grad ELBO = E[ sum_k (sum_j M_kj f_j - b_k) grad log q_k + sum_j grad f_j ]

    k runs over the elements of guide sites that are not reparameterised; the others keep their pathwise gradient, the
    second sum, as do the model's parameters. Subsampling scales and masks enter f, never the score. Unlike a loss that
    follows values through the tensor graph, it stays right where model or guide branch on a value (``if z:``).

    Sources: Ranganath, Gerrish & Blei (2014), "Black box variational inference"; Schulman, Heess, Weber & Abbeel
    (2015), "Gradient estimation using stochastic computation graphs"; Mnih & Rezende (2016), "Variational inference for
    Monte Carlo objectives", and Kool, van Hoof & Welling (2019) for leave-one-out.

    Args:
        num_particles: N, at least 1.
        vectorize_particles: run the particles together, in an outermost plate; False where model or guide branch on a
            value. One after the other, particles redraw subsamples: leave-one-out is of use only with ``subsample``
            fixed.
        max_plate_nesting: number of plate dimensions; guessed by one more run of model and guide if infinite.
        baseline: "auto" is leave-one-out from two particles on, otherwise none. One with a state is updated afterwards.
        credit: None: program order and plates; ``Total()`` where plates exchange values although they declare not to.
        retain_graph: as in ``torch.autograd.backward``.
        strict_enumeration_warning: as in ``pyro.infer.ELBO``.

    Raises:
        ScorefnError: from each method, for what would be wrong silently: enumerated sites, ``infer={"baseline": ...}``,
            partly reparameterised guide sites, latents without a guide; or for a log q without gradient.
        NonFiniteError: log p or log q is NaN or infinite, with the particles named.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model():
        ...     z = pyro.sample("z", dist.Bernoulli(0.3))
        ...     pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.7))
        >>> def guide():
        ...     pyro.sample("z", dist.Bernoulli(logits=pyro.param("logit", torch.tensor(0.0))))
        >>> pyro.clear_param_store()
        >>> pyro.set_rng_seed(0)
        >>> optim = pyro.optim.Adam({"lr": 0.05})
        >>> svi = pyro.infer.SVI(model, guide, optim, loss=ScoreFunctionELBO(num_particles=16))
        >>> losses = [svi.step() for _ in range(300)]
        >>> round(pyro.param("logit").sigmoid().item(), 1)  # exactly .344
        0.3
    """

    def __init__(
        self,
        num_particles: int = 1,
        *,
        vectorize_particles: bool = True,
        max_plate_nesting: float = math.inf,
        baseline: Baseline | Literal["auto"] | None = "auto",
        credit: Credit | None = None,
        retain_graph: bool | None = None,
        strict_enumeration_warning: bool = True,
    ) -> None:
        num_particles = check_count("num_particles", num_particles)
        if isinstance(baseline, str) and baseline != "auto":
            raise ScorefnError(f'baseline must be a baseline object, None or "auto", but it is {baseline!r}.')
        super().__init__(
            num_particles=num_particles,
            max_plate_nesting=max_plate_nesting,
            vectorize_particles=vectorize_particles,
            strict_enumeration_warning=strict_enumeration_warning,
            retain_graph=retain_graph,
        )
        self.baseline = baseline
        self.credit = credit

    def draws(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any) -> Draws:
        """N particles as Draws of the ELBO (its own sign): x the guide's samples, log_prob ``[N, K]``, fx ``[N, J]``.

        K counts the elements of guide sites that are not reparameterised, J those of log p of every model site and of
        -log q of every guide site; ``credit`` is the particles' ``PlateCredit``.

        Raises:
            ScorefnError: the guide has no such site; or as the class says.
        """
        return self._particles(model, guide, args, kwargs).draws()

    def differentiable_loss(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """``-ELBO``, a scalar whose gradient is the estimate."""
        particles = self._particles(model, guide, args, kwargs)
        if particles.pathwise:
            log_ratio = particles.fx.sum(-1)
            if not bool((finite := torch.isfinite(log_ratio.detach())).all()):
                bad = (~finite).nonzero().flatten().tolist()
                raise NonFiniteError(
                    f"log p - log q is not finite at {len(bad)} of {len(finite)} particles, namely {bad[:10]}: it "
                    "would make the whole gradient NaN. Every sample of the guide must lie inside the model's support."
                )
            return -log_ratio.mean(0)
        return -estimate(particles.draws(), self.credit, self.baseline)

    def loss(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any) -> float:
        """``-ELBO``, without gradient."""
        with torch.no_grad():
            return self.differentiable_loss(model, guide, *args, **kwargs).item()

    def loss_and_grads(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any) -> float:
        """``-ELBO``, after its estimated gradient was added to every parameter's ``grad``."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward(retain_graph=self.retain_graph)
        return loss.item()

    def _particles(
        self, model: Callable[..., Any], guide: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Particles:
        together = self.num_particles if self.vectorize_particles else 1
        try:
            pairs = list(self._get_traces(model, guide, args, kwargs))
        except RuntimeError as error:
            if together > 1:
                error.add_note(
                    f"ScoreFunctionELBO ran {together} particles together, in an outermost plate of model and guide. "
                    "If they branch on a value or are not written for batches, set vectorize_particles=False."
                )
            raise
        return gather([read_run(model_trace, guide_trace, together) for model_trace, guide_trace in pairs])

    def _get_trace(
        self, model: Callable[..., Any], guide: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Trace, Trace]:
        """One run of the guide, and of the model against it."""
        pair: tuple[Trace, Trace] = get_importance_trace("flat", self.max_plate_nesting, model, guide, args, kwargs)
        return pair
