"""ClipUp, and a step of any optimiser that leaves no trace outside its state."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from scorefn.core import ScorefnError
from scorefn.search.points import is_number
from scorefn.search.strategy import Diverged

OptimizerFactory: TypeAlias = Callable[[list[Tensor]], torch.optim.Optimizer]
"""Makes an optimiser of parameters, such as ``lambda parameters: torch.optim.Adam(parameters, lr=0.01)``."""


class ClipUp(torch.optim.Optimizer):
    """Gradient descent in steps of fixed length, with momentum and a speed limit.

    For each parameter x with gradient g and velocity v, which starts at 0::

        v <- momentum v - lr g/|g|,    v <- v min(1, max_speed/|v|),    x <- x + v

    Only the direction of g enters, hence one setting for any scale of the objective; the length of a step is known
    beforehand. Where g is zero nothing is added to the velocity.

    Source: Toklu, Liskowski & Srivastava (2020), "ClipUp: a simple and powerful optimizer for distribution-based policy
    evolution", PPSN, algorithm 2; ``lr = max_speed/2`` and momentum .9 are its recommendation (section 3).

    Args:
        params: tensors, or groups of them.
        max_speed: the largest length of a step.
        lr: what a gradient adds to the velocity; None: ``max_speed/2``.
        momentum: from 0 to below 1.

    Raises:
        ScorefnError: max_speed or lr is not positive, or momentum is outside [0, 1).

    Example:
        >>> import torch
        >>> from scorefn.search import ClipUp
        >>> x = torch.zeros(2, requires_grad=True)
        >>> optimizer = ClipUp([x], max_speed=1.0)  # lr is half of that
        >>> x.grad = torch.tensor([3000.0, 4000.0])  # only its direction counts
        >>> optimizer.step()
        >>> x.detach()
        tensor([-0.3000, -0.4000])
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        max_speed: float,
        lr: float | None = None,
        momentum: float = 0.9,
    ) -> None:
        for name, value in (("max_speed", max_speed), ("lr", max_speed if lr is None else lr)):
            if not is_number(value) or not 0 < value < math.inf:
                raise ScorefnError(
                    f"{name} must be a positive number, but it is {value!r}: it is the length of a step."
                )
        lr = max_speed / 2 if lr is None else lr
        if not is_number(momentum) or not 0 <= momentum < 1:
            raise ScorefnError(
                f"momentum must be at least 0 and below 1, but it is {momentum!r}: from 1 on the velocity never fades."
            )
        super().__init__(params, {"lr": lr, "momentum": momentum, "max_speed": max_speed})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for x in group["params"]:
                if x.grad is None:
                    continue
                state = self.state[x]
                velocity = state.get("velocity")
                velocity = torch.zeros_like(x) if velocity is None else group["momentum"] * velocity
                length = torch.linalg.vector_norm(x.grad)
                velocity -= torch.where(length > 0, group["lr"] / length, 0.0) * x.grad
                speed = torch.linalg.vector_norm(velocity)
                velocity *= torch.where(speed > group["max_speed"], group["max_speed"] / speed, 1.0)
                state["velocity"] = velocity
                x += velocity
        return loss


def check_steps_alone(optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimiser whose step evaluates the function: a generation has one gradient.

    Raises:
        ScorefnError: its ``step`` cannot be called without a closure.
    """
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ScorefnError(
            f"{type(optimizer).__name__} needs a closure, to evaluate the function and its gradient several times a "
            "step, but a generation has one estimate of one gradient: use an optimiser that steps without, such as "
            "torch.optim.Adam."
        )


def new_optimizer(factory: OptimizerFactory, point: Tensor) -> torch.optim.Optimizer:
    """The optimiser of a point ``[D]`` that requires grad.

    Raises:
        ScorefnError: factory made no optimiser of the point.
    """
    repair = "pass for instance lambda parameters: torch.optim.Adam(parameters, lr=0.01)."
    try:
        optimizer = factory([point])
    except TypeError as error:
        raise ScorefnError(
            f"optimizer={factory!r} cannot be called with a list of parameters and nothing else ({error}): {repair}"
        ) from error
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ScorefnError(
            f"optimizer must return a torch.optim.Optimizer of the list of parameters it is given, but it returned "
            f"{type(optimizer).__name__}: {repair}"
        )
    check_steps_alone(optimizer)
    if [id(entry) for group in optimizer.param_groups for entry in group["params"]] != [id(point)]:
        raise ScorefnError(
            f"optimizer returned a {type(optimizer).__name__} of other parameters than the list it was given, which "
            f"would never move: {repair}"
        )
    return optimizer


def fresh_optimizer(factory: OptimizerFactory, point: Tensor) -> tuple[str, dict[str, Any]]:
    """The class and the memory of an optimiser of a point ``[D]`` before its first step; see ``new_optimizer``."""
    optimizer = new_optimizer(factory, point.detach().clone().requires_grad_())
    return type(optimizer).__name__, optimizer.state_dict()


def descended(
    factory: OptimizerFactory, point: Tensor, gradient: Tensor, memory: dict[str, Any]
) -> tuple[Tensor, dict[str, Any]]:
    """One step of an optimiser from a point ``[D]``: the next point and what the optimiser remembers; both new.

    Args:
        factory: makes the optimiser.
        point: ``[D]``.
        gradient: ``[D]``, to be descended.
        memory: what ``fresh_optimizer`` or the last step returned.

    Raises:
        ScorefnError: factory made no optimiser of the point.
        NonFiniteError: what the optimiser would remember is not finite.
    """
    moved = point.detach().clone().requires_grad_()
    optimizer = new_optimizer(factory, moved)
    optimizer.load_state_dict(copy.deepcopy(memory))
    moved.grad = gradient
    optimizer.step()
    after = optimizer.state_dict()
    kept = [value for entry in after["state"].values() for value in entry.values() if isinstance(value, Tensor)]
    if not all(bool(value.isfinite().all()) for value in kept):
        raise Diverged(
            f"This generation would make the state of {type(optimizer).__name__} infinite for good: the gradient has a "
            f"length of {float(torch.linalg.vector_norm(gradient)):.1e}. Tell points near those that ask returned."
        )
    return moved.detach(), after
