"""What the losses for Pyro have in common: N particles of model and guide, and three ways to ask for their loss."""

from __future__ import annotations

import inspect
import math
from abc import abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from numbers import Real
from typing import Any

import torch
from pyro.infer import ELBO
from pyro.infer.enum import get_importance_trace
from torch import Tensor

from scorefn.core import ScorefnError, check_count
from scorefn.estimators.gradient import first_order
from scorefn.posteriors.checks import contradiction, plate_nesting, refuse_enumerated, refuse_hidden_samplers
from scorefn.posteriors.subsamples import SharedSubsamples
from scorefn.posteriors.traces import Trace


class ParticleLoss(ELBO):  # type: ignore[misc]
    """A ``pyro.infer.ELBO`` that is known by its differentiable loss."""

    def __init__(
        self,
        num_particles: int,
        *,
        vectorize_particles: bool = True,
        max_plate_nesting: float = math.inf,
        retain_graph: bool | None = None,
        strict_enumeration_warning: bool = True,
    ) -> None:
        nesting = max_plate_nesting
        if isinstance(nesting, bool) or not isinstance(nesting, Real) or not nesting >= 0 or nesting % 1 > 0:
            raise ScorefnError(
                "max_plate_nesting must be an integer of at least 0, the number of plates that may lie in one "
                f"another, but it is {nesting!r}. Count them, or leave it out: it is then guessed."
            )
        super().__init__(
            num_particles=check_count("num_particles", num_particles),
            max_plate_nesting=max_plate_nesting,
            vectorize_particles=vectorize_particles,
            strict_enumeration_warning=strict_enumeration_warning,
            retain_graph=retain_graph,
        )

    def __repr__(self) -> str:
        """As it was called, without what is left at its default."""
        shown = []
        for parameter in inspect.signature(type(self)).parameters.values():
            text = repr(self._setting(parameter.name, parameter.default))
            if parameter.name == "num_particles" or text != repr(parameter.default):
                shown.append(f"{parameter.name}={text}")
        return f"{type(self).__name__}({', '.join(shown)})"

    def _setting(self, name: str, default: Any) -> Any:
        """What was passed as the parameter of this name."""
        return getattr(self, name, default)

    @property
    def num_together(self) -> int:
        """How many particles one pair of traces holds."""
        return int(self.num_particles) if self.vectorize_particles else 1

    @abstractmethod
    def differentiable_loss(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """The loss, a scalar whose gradient is the estimate."""

    def loss(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any) -> float:
        """The loss without gradient, a number.

        Raises:
            ScorefnError: as the class says.
        """
        with torch.no_grad():
            return self.differentiable_loss(model, guide, *args, **kwargs).item()

    def loss_and_grads(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any) -> float:
        """The loss, a number, after its estimated gradient was added to every parameter's ``grad``.

        Raises:
            ScorefnError: as the class says; every ``grad`` is then as it was.
        """
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward(retain_graph=self.retain_graph)
        return loss.item()

    def trace_pairs(
        self, model: Callable[..., Any], guide: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> list[tuple[Trace, Trace]]:
        """Traces of model and guide: one pair where particles run together, otherwise one for each.

        Raises:
            ScorefnError: a site is marked for enumeration, or a rejection sampler of the guide is hidden by a wrapper;
                or what contradicts in model and guide, where Pyro stopped at a value of it.
        """
        shared = SharedSubsamples() if self.num_together < self.num_particles else nullcontext()
        try:
            with shared:
                pairs = list(self._get_traces(model, guide, args, kwargs))
        except RuntimeError as error:
            if self.num_together > 1:
                error.add_note(
                    f"{type(self).__name__} ran {self.num_together} particles together, in an outermost plate of model "
                    "and guide. If they branch on a value or are not written for batches, set "
                    "vectorize_particles=False."
                )
                self._note_nesting(error, model, guide, args, kwargs)
            raise
        except ScorefnError:
            raise
        except ValueError as error:
            if (refusal := contradiction(type(self).__name__, model, guide, args, kwargs)) is not None:
                raise refusal from error
            if self.num_together > 1:
                self._note_nesting(error, model, guide, args, kwargs)
            raise
        for model_trace, guide_trace in pairs:
            refuse_enumerated(type(self).__name__, guide_trace, model_trace)
            refuse_hidden_samplers(guide_trace)
        return pairs

    def _note_nesting(
        self,
        error: Exception,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        """Say so where plates lie deeper than they were said to, so that the particles' plate met one of them."""
        said = self.max_plate_nesting - 1  # Pyro counts the plate of the particles
        if said < math.inf and (found := plate_nesting(model, guide, args, kwargs)) > said:
            error.add_note(
                f"max_plate_nesting={int(said)} was given to {type(self).__name__}, but plates lie {found} deep in "
                f"model or guide, so that the plate of the {self.num_together} particles met one of them: set "
                f"max_plate_nesting={found}, or leave it out."
            )

    def _get_trace(
        self, model: Callable[..., Any], guide: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Trace, Trace]:
        """One run of the guide, and of the model against it."""
        pair: tuple[Trace, Trace] = get_importance_trace("flat", self.max_plate_nesting, model, guide, args, kwargs)
        return pair


def once_differentiable(loss: Tensor) -> Tensor:
    """The same loss, whose gradient is refused where a second derivative is wanted of it."""
    return first_order(
        loss,
        "This loss has a first derivative only: the gradient of a score-function surrogate, differentiated once more "
        "(create_graph=True), is not the second derivative of the bound. Differentiate "
        "scorefn.dice(loss.draws(model, guide)).mean() of a ScoreFunctionELBO, which has every derivative.",
    )
