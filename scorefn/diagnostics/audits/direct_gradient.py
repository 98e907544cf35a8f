"""Whether f depends on a parameter without giving it a gradient: by moving the parameter a little."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from scorefn.core import PyTree
from scorefn.diagnostics.audits.replay import Replay
from scorefn.diagnostics.audits.report import Finding, Notes
from scorefn.diagnostics.audits.testing import slopes, zero_mean

_NAME = "dropped gradient"


def audit_direct_gradient(
    notes: Notes,
    replay: Replay,
    x: PyTree,
    more: Callable[[], PyTree],
    parameters: Sequence[Tensor],
    false_alarm: float,
) -> None:
    """Compare central differences of f in each parameter with what autograd says, on average over the draws.

    The identity needs ``E[f grad log p] + E[grad f]``, so a part of grad f whose mean is zero (the score in
    ``f = log joint - log q``) may be left out; a test of the mean tells, on ``more()`` draws where f takes them.
    """
    base, again = replay(x), replay(x)
    if not torch.equal(base, again):
        notes.unchecked[_NAME] = (
            "f is random in a way that cannot be repeated, which hides how it depends on parameters."
        )
        return
    try:
        _compare_slopes(notes, replay, x, more, parameters, false_alarm)
    except Exception as error:  # whatever f raises where it does not like a parameter
        notes.unchecked[_NAME] = f"f fails beside the present parameters ({type(error).__name__})."


def _compare_slopes(
    notes: Notes,
    replay: Replay,
    x: PyTree,
    more: Callable[[], PyTree],
    parameters: Sequence[Tensor],
    false_alarm: float,
) -> None:
    base = replay(x)
    signs = [_direction(q) for q in parameters]
    if not any(_moves(replay, x, base, parameters, [s * flip for s in signs]) for flip in (1, -1)):
        notes.checked[_NAME] = "exact replay: f does not depend on the parameters but through the draws."
        return
    try:
        x = more()
        base = replay(x)
    except Exception:  # whatever f raises for another number of draws
        base = replay(x)
    smallest, skewed = 0.0, 0.0
    for number, (q, sign) in enumerate(zip(parameters, signs, strict=True)):
        if not (_moves(replay, x, base, [q], [sign]) or _moves(replay, x, base, [q], [-sign])):
            continue
        step = _step(q)
        with _shifted([q], [step * sign]):
            above = replay(x)
        with _shifted([q], [-step * sign]):
            below = replay(x)
        if not bool((above.isfinite() & below.isfinite()).all()):
            notes.unchecked[_NAME] = f"f is not finite beside the present value of parameter {number}."
            continue
        difference = (above - below).double() / (2 * float(step))
        try:
            given = slopes(replay.differentiable(x), q, sign.unsqueeze(0))[..., 0].double()
        except RuntimeError as error:
            notes.unchecked[_NAME] = f"f cannot be differentiated twice ({str(error).splitlines()[0][:100]})."
            continue
        allowed = 0.02 * float(difference.abs().mean()) + 32 * replay.eps * float(base.abs().max()) / float(step)
        missing = (difference - given).flatten(1) if base.ndim > 1 else (difference - given).unsqueeze(1)
        test = zero_mean(missing, false_alarm / len(parameters), allowed)
        if test.off:
            fact = f"f moves with parameter {number} of shape {tuple(q.shape)}, but autograd does not see all of it."
            reason = "The direct part E[grad f] of the gradient is lost, silently."
            repair = (
                "Compute f in torch from the parameter itself: no .item(), .detach(), numpy or no_grad() on the way."
            )
            evidence = {"measured slope": float(difference.mean()), "slope by autograd": float(given.mean())}
            notes.findings.append(Finding(_NAME, fact, reason, repair, evidence | test.evidence))
            return
        smallest = max(smallest, test.detectable)
        skewed = skewed if test.valid else max(skewed, test.needed)
    if skewed:
        notes.unchecked[_NAME] = f"the slopes of f jump: about {skewed:.0f} draws would be needed for a test."
    else:
        notes.checked.setdefault(
            _NAME,
            f"statistical: a missing part of E[grad f] of {smallest:.2g} along random signs would have been found.",
        )


def _moves(replay: Replay, x: PyTree, base: Tensor, parameters: Sequence[Tensor], signs: Sequence[Tensor]) -> bool:
    with _shifted(parameters, [_step(q) * sign for q, sign in zip(parameters, signs, strict=True)]):
        return not torch.equal(replay(x), base)


def _direction(q: Tensor) -> Tensor:
    """Random signs and sizes, so that no simple combination of the entries stays where it is."""
    sign = 2 * torch.randint(2, q.shape, device=q.device) - 1
    direction: Tensor = sign * (0.5 + torch.rand(q.shape, device=q.device)).to(q.dtype)
    return direction


def _step(q: Tensor) -> Tensor:
    """A step that balances rounding and curvature, relative to the size of the parameter."""
    size = q.detach().square().mean().sqrt()
    smallest = q.detach().abs().min().clamp(min=0.01 * size)  # no entry changes its sign but those near zero
    step: Tensor = torch.finfo(q.dtype).eps ** (1 / 3) * torch.where(size > 0, torch.minimum(smallest, size), 1.0)
    return step


@contextmanager
def _shifted(parameters: Sequence[Tensor], steps: Sequence[Tensor]) -> Iterator[None]:
    """The parameters elsewhere, beneath autograd, and back bit for bit."""
    kept = [q.data for q in parameters]
    try:
        for q, step in zip(parameters, steps, strict=True):
            q.data = q.data + step
        yield
    finally:
        for q, data in zip(parameters, kept, strict=True):
            q.data = data
