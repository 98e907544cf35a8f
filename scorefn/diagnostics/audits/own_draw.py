"""Whether a baseline, or the coefficient of a control variate, depends on the draw it is used for: by replacement."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from scorefn.core import Draws, ScorefnError, is_stateful, surrogate
from scorefn.diagnostics.audits.preservation import Snapshot
from scorefn.diagnostics.audits.report import Finding, Notes
from scorefn.tracking.generators import generators_restored, seed_generators

_BASELINE = "baseline of its own draw"
_READING = "baseline that reading changes"
_REFUSED = "baseline that is refused"
_VARIATE = "control variate of its own draw"
OWN_FEATURES = "baseline of its own features"
_BLOCKS = 6  # that are replaced, one at a time
_DECISIONS = 3


@dataclass
class Reading:
    """A baseline read again and again, each time with the same random numbers and from the same state."""

    baseline: Any
    snapshot: Snapshot
    seed: int

    def __call__(self, draws: Draws, *, restore: bool = True) -> Tensor:
        """``[N, *B, K]``, detached."""
        with generators_restored():
            seed_generators(self.seed)
            try:
                value: Tensor = self.baseline(draws.signal(), draws).detach()
            finally:
                if restore:
                    self.snapshot.restore()
        return value.expand(draws.log_prob.shape)


def audit_baseline(notes: Notes, baseline: Any, draws: Draws, donors: Draws, snapshot: Snapshot, seed: int) -> None:
    """Replace what a baseline must not know, hold everything else, and see whether it moves.

    First the values and log-probabilities of a draw (and of its whole block), from the decision in question on; then
    what was drawn. What the decision was made from (``context``, ``x`` before it) is held.
    """
    name = type(baseline).__name__
    try:
        surrogate(draws, baseline=baseline)
    except ScorefnError as error:
        reason = "An estimate with it raises the same."
        notes.findings.append(Finding(_REFUSED, f"{name} does not fit these draws.", reason, str(error), {}))
        return
    finally:
        snapshot.restore()
    reading = Reading(baseline, snapshot, seed)
    first, second = reading(draws, restore=False), reading(draws, restore=False)
    snapshot.restore()
    if not torch.equal(first, second):
        fact, reason = f"{name} returned another value when it was read twice.", "Reading has changed what it knows"
        repair = "Learn in update(signal, draws), which is called after the baseline was read."
        evidence = {"largest difference": float((first - second).abs().max())}
        notes.findings.append(Finding(_READING, fact, f"{reason}, and it has met its own draw.", repair, evidence))
    else:
        notes.checked[_READING] = "exact replay: it was read twice."
    states = [("as it is", reading)]
    if is_stateful(baseline):
        states += _updated(notes, baseline, draws, donors, seed)
    for label, state in states:
        finding = _moved_by_own(notes, name, label, state, draws, donors)
        if finding is not None:
            notes.findings.append(finding)
            return
    labels = ", and ".join(label for label, _ in states)
    notes.checked[_BASELINE] = (
        f"exact replay of {name} {labels}: what a draw was, and was worth, was replaced by another."
    )


def audit_control_variate(
    notes: Notes, control_variate: Any, draws: Draws, donors: Draws, snapshot: Snapshot, seed: int
) -> None:
    """Replace the value of a draw and of its block: its correction, ``fx' - fx``, must stay."""

    def correction(given: Draws) -> Tensor:
        with generators_restored():
            seed_generators(seed)
            try:
                changed: Tensor = control_variate(given).fx - given.fx
                return changed.detach()
            finally:
                snapshot.restore()

    name = type(control_variate).__name__
    try:
        base = correction(draws)
    except ScorefnError as error:
        fact = f"{name} does not fit these draws."
        notes.findings.append(Finding(_VARIATE, fact, "An estimate with it raises the same.", str(error), {}))
        return
    for block in _blocks(draws):
        own = block.reshape(-1, *[1] * (draws.fx.ndim - 1))
        value = torch.where(own, donors.fx.detach(), draws.fx)
        moved = (correction(replace(draws, fx=value)) - base).abs() * own
        if float(moved.max()) > _limit(draws.fx, donors.fx, base):
            fact = f"The correction that {name} makes to a draw depends on the value of that draw (or of its block)."
            reason = "A coefficient that was fitted to its own draw changes the expectation."
            repair = "Fit it on the other blocks of draws, as LinearControlVariate does, or on past draws."
            evidence = {"moved by": float(moved.max()), "values were replaced by": _moved_values(draws, donors)}
            notes.findings.append(Finding(_VARIATE, fact, reason, repair, evidence))
            return
    notes.checked[_VARIATE] = f"exact replay of {name}: the values of a draw and its block were replaced by others."


def _updated(notes: Notes, baseline: Any, draws: Draws, donors: Draws, seed: int) -> list[tuple[str, Reading]]:
    """A copy of a baseline that has learned from other draws."""
    try:
        learned = copy.deepcopy(baseline)
        learned.update(donors.signal(), donors)
        reading = Reading(learned, Snapshot([], [learned]), seed)
        reading(draws)
    except Exception as error:  # what cannot be copied, and what cannot learn from these draws
        notes.unchecked["baseline after an update"] = (
            f"a copy of it could not be updated ({type(error).__name__}: {error})."
        )
        return []
    return [("after an update", reading)]


def _moved_by_own(notes: Notes, name: str, label: str, read: Reading, draws: Draws, donors: Draws) -> Finding | None:
    base = read(draws)
    for decision in _decisions(draws):
        for block in _blocks(draws):
            own = block.reshape(-1, *[1] * (base.ndim - 1))
            place = torch.arange(base.shape[-1], device=base.device) == decision
            for what, changed in (("worth", _another_worth), ("drawn", _another_draw)):
                moved = (read(changed(draws, donors, own, decision)) - base).abs() * (own & place)
                if float(moved.nan_to_num().max()) <= _limit(draws.signal(), donors.signal(), base):
                    continue
                leaves = [leaf for leaf in pytree.tree_leaves(draws.x) if isinstance(leaf, Tensor)]
                if what == "drawn" and len(leaves) > 1:
                    notes.unchecked[OWN_FEATURES] = (
                        f"{name} reads the draw that it is subtracted from, of which there are {len(leaves)} parts: it "
                        "is unbiased only if what it reads was known before the decision, as context is."
                    )
                    continue
                seen = "its value or log-probability" if what == "worth" else "what was drawn"
                fact = f"{name} ({label}) moved for a draw when {seen} (or that of its block) was replaced by another."
                reason = "A baseline that knows the draw it is subtracted from correlates with its score, and biases."
                evidence = {"moved by": float(moved.max()), "values were replaced by": _moved_values(draws, donors)}
                return Finding(_BASELINE, fact, reason, _repair(what), evidence)
    return None


def _repair(what: str) -> str:
    if what == "worth":
        return (
            "Leave the draw and its whole block out, as LeaveOneOut() does, or read what was learned from past draws "
            "and update it afterwards."
        )
    return "Give it features that were known before the draw (context, an observation), never the draw itself."


def _another_worth(draws: Draws, donors: Draws, own: Tensor, decision: int) -> Draws:
    """The values and log-probabilities of a block, from a decision on, are those of other draws."""
    from_decision = torch.arange(draws.log_prob.shape[-1], device=draws.log_prob.device) >= decision
    log_prob = torch.where(own & from_decision, donors.log_prob, draws.log_prob)
    values = own if draws.fx.shape[-1] != draws.log_prob.shape[-1] else own & from_decision
    return replace(draws, fx=torch.where(values, donors.fx.detach(), draws.fx), log_prob=log_prob)


def _another_draw(draws: Draws, donors: Draws, own: Tensor, decision: int) -> Draws:
    """What was drawn in a block is another draw; of sequences, from a decision on."""
    decisions = draws.log_prob.shape[-1]
    contexts = {id(leaf) for leaf in pytree.tree_leaves(draws.context)}
    block = own.reshape(-1)

    def mix(leaf: Any, other: Any, known: bool) -> Any:
        if not isinstance(leaf, Tensor) or not isinstance(other, Tensor) or leaf.shape != other.shape:
            return leaf
        mask = block.reshape(-1, *[1] * (leaf.ndim - 1))
        if decisions > 1:
            if leaf.ndim < 2 or leaf.shape[1] != decisions:
                return leaf
            place = torch.arange(decisions, device=leaf.device).reshape(1, -1, *[1] * (leaf.ndim - 2))
            mask = mask & (place > decision if known else place >= decision)
        elif known:
            return leaf
        return torch.where(mask, other, leaf)

    if pytree.tree_structure(draws.x) != pytree.tree_structure(donors.x):
        return draws
    x = pytree.tree_map(lambda a, b: mix(a, b, id(a) in contexts), draws.x, donors.x)
    context = draws.context
    if decisions > 1 and context is not None:
        context = pytree.tree_map(lambda a, b: mix(a, b, True), context, donors.context)
    return replace(draws, x=x, context=context)


def _decisions(draws: Draws) -> list[int]:
    """Some decisions: the first, the last and one between."""
    last = draws.log_prob.shape[-1] - 1
    return sorted({0, last // 2, last})[:_DECISIONS]


def _blocks(draws: Draws) -> Iterator[Tensor]:
    """Some blocks of draws, bool ``[N]``."""
    label = torch.arange(len(draws), device=draws.log_prob.device) if draws.block is None else draws.block
    labels = torch.unique(label)
    chosen = labels if len(labels) <= _BLOCKS else labels[torch.linspace(0, len(labels) - 1, _BLOCKS).long()]
    return (label == one for one in chosen)


def _limit(before: Tensor, after: Tensor, base: Tensor) -> float:
    """What rounding of sums over the draws may move."""
    scale = max(float(t.detach().abs().max()) for t in (before, after, base))
    return float(32 * torch.finfo(before.dtype).eps * scale * len(before) ** 0.5)


def _moved_values(draws: Draws, donors: Draws) -> float:
    return float((donors.fx - draws.fx).detach().abs().max())
