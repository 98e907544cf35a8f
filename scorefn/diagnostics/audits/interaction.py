"""Whether f of a draw depends on the other draws, and f of a problem on the other problems: by replay."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from scorefn.core import PyTree
from scorefn.core.protocols import tensor_leaves
from scorefn.diagnostics.audits.replay import Replay, mixed, rows
from scorefn.diagnostics.audits.report import Finding, Notes
from scorefn.diagnostics.audits.testing import zero_mean

_SETTINGS = 96  # in which companions are replaced, where there are few draws
_ROUNDS = 12  # in each of which every draw is replaced beside every other one, at most
_LEAST_ROUNDS = 3
_REDRAWN = 32  # times that a replacement is drawn again because it is what it replaces
_PAIRS = 256

_REASON = "A draw is charged with its own value alone, so what it does to the values of others is lost: the gradient is"
_DRAWS = "interacting draws"
_COUNT = "values that depend on the number of draws"
_PROBLEMS = "interacting problems"
_CHANGED = "draws changed in place"


def audit_draws_apart(notes: Notes, replay: Replay, x: PyTree, donors: PyTree, false_alarm: float) -> None:
    """Replace the companions of some draws, in their places, and see whether the values of these move.

    Every draw is replaced beside every other one in each of several rounds, each time by another donor. At a fixed
    shape the value of a row is the same to the bit whatever the other rows hold, so only differences of the size of
    rounding are let pass.
    """
    base, again = replay(x), replay(x)
    n = len(base)
    if n < 2:
        notes.unchecked[_DRAWS] = "there is one draw only; raise num_samples."
        return
    if replay.wrote:
        fact = "f changes the draws that it is given, where torch does not see it."
        reason = "The draws that are scored would no longer be those that were valued."
        notes.findings.append(Finding(_CHANGED, fact, reason, "Work on a copy, such as x.clone().", {}))
    else:
        notes.checked[_CHANGED] = "the draws were compared before and after each call."
    limit = resolution(base) + 4 * (again - base).abs()
    steady = bool(((again - base).abs() <= resolution(base)).all())
    most, settings = 0.0, 0
    for number, keep in _apart(n):
        settings += 1
        changed = mixed(keep, x, _companions(x, donors, alike=number % 4 == 3))
        difference = ((replay(changed) - base).abs() * _lead(keep, base)).nan_to_num()
        most = max(most, float(difference.max()))
        if not bool((difference > limit).any()):
            continue
        if steady and not replay.drew:
            evidence = {"largest difference": most, "spread of the values": float(_spread(base))}
            notes.findings.append(
                _interacting("f of a draw changed when other draws beside it were replaced.", evidence)
            )
        else:
            _compare_means(notes, replay, x, changed, keep, false_alarm)
        return
    if not steady:
        _compare_means(notes, replay, x, changed, keep, false_alarm)
        return
    if most == 0.0 and not float(_spread(base)):
        notes.unchecked[_DRAWS] = "f had the same value at every draw that was tried, so that nothing could show."
        return
    noise = ", with its random numbers repeated" if replay.drew else ""
    notes.checked[_DRAWS] = (
        f"exact replay{noise}: in {settings} settings the other draws were replaced, and no value moved by more than "
        f"{float(limit.max()):.2g}."
    )


def audit_number_of_draws(notes: Notes, replay: Replay, settings: list[PyTree]) -> None:
    """Call f with the first draws alone: in the same places, their values may differ by rounding only.

    Another number of draws rounds differently (blocks of a matrix product), so a difference counts from 1 % of the
    spread of the values on, and only if every setting shows it.
    """
    if _DRAWS in {finding.name for finding in notes.findings}:
        notes.unchecked[_COUNT] = "draws interact, which makes values depend on their number as well."
        return
    if replay.drew:
        notes.unchecked[_COUNT] = "f draws random numbers, which another number of draws would use otherwise."
        return
    shares, moved = [], False
    for x in settings:
        base = replay(x)
        scale = torch.maximum(0.01 * _spread(base), 1e4 * replay.eps * base.abs().max())
        scale = scale + 8 * _sensitivity(replay, x, base)
        try:
            parts = {count: replay(rows(x, slice(0, count))) for count in {1, (len(base) + 1) // 2} - {len(base)}}
            backwards = replay(rows(x, torch.arange(len(base) - 1, -1, -1))).flip(0)
        except Exception as error:  # whatever f raises for another number of draws
            notes.unchecked[_COUNT] = f"f takes {len(base)} draws only ({type(error).__name__})."
            return
        if any(part.shape != base[:count].shape for count, part in parts.items()):
            notes.unchecked[_COUNT] = "f of fewer draws has another shape."
            return
        differences = [(part - base[:count]).abs().max() for count, part in parts.items()]
        worst = torch.stack(differences).max() if differences else base.new_zeros(())
        shares.append(float(worst / scale.clamp(min=torch.finfo(base.dtype).tiny)))
        moved = moved or bool(((backwards - base).abs() > scale).any())
    if min(shares) > 1:
        fact = "f of a draw is another number when fewer draws are given beside it."
        reason = "The mean is then no expectation of one f, and changes with num_samples."
        evidence = {"difference, in units of what rounding may do": min(shares)}
        repair = "Let f return the value of each draw itself: no division by the number of draws, no running index."
        notes.findings.append(Finding(_COUNT, fact, reason, repair, evidence))
        return
    places = " A draw's value depends on its place among them (data beside the draws?)." if moved else ""
    notes.checked[_COUNT] = f"exact replay of the first draws alone, up to rounding.{places}"


def audit_problems_apart(notes: Notes, replay: Replay, x: PyTree, donors: PyTree) -> None:
    """Replace the draws of some problems B, and see whether the values of the others move."""
    base = replay(x)
    shape = base.shape[1:]
    if shape.numel() < 2:
        return
    leaves = [leaf for leaf in pytree.tree_leaves(x) if isinstance(leaf, Tensor)]
    if any(leaf.shape[: base.ndim] != base.shape for leaf in leaves):
        notes.unchecked[_PROBLEMS] = f"the draws do not lead with the shape {tuple(base.shape)} of the values."
        return
    again = replay(x)
    limit = resolution(base) + 4 * (again - base).abs()
    settings = 0
    for number, flat in _apart(shape.numel()):
        settings += 1
        keep, donor = flat.reshape(shape), _companions(x, donors, alike=number % 4 == 3)
        difference = ((replay(mixed(keep.expand(base.shape), x, donor)) - base).abs() * keep.to(base)).nan_to_num()
        if not bool((difference > limit).any()):
            continue
        if replay.drew:
            notes.unchecked[_PROBLEMS] = "f draws random numbers, and how many may depend on the draws."
            return
        fact = (
            f"f returned one value for each of the {tuple(shape)} problems, and that of one depends on others' draws."
        )
        reason = "Each value is charged to the log-probability of its own problem only, so the gradient is biased."
        repair = "Sum over what interacts, so that f returns [N] or fewer batch dimensions; or keep the problems apart."
        evidence = {"largest difference": float(difference.max()), "spread of the values": float(_spread(base))}
        notes.findings.append(Finding(_PROBLEMS, fact, reason, repair, evidence))
        return
    notes.checked[_PROBLEMS] = f"exact replay: in {settings} settings the draws of other problems were replaced."


def resolution(values: Tensor) -> Tensor:
    """Differences that say nothing: rounding of the values, and a share of their spread that no estimate shows."""
    own = torch.finfo(values.dtype).eps
    said_nothing: Tensor = 4 * own * values.abs() + own**0.5 * _spread(values)
    return said_nothing


def _apart(n: int) -> Iterator[tuple[int, Tensor]]:
    """The number of a round, and which of n entries stay; each round parts every entry from every other, both ways.

    Two entries whose numbers differ are parted by some binary digit of these: one digit a setting, and its complement.
    """
    digits = max((n - 1).bit_length(), 1)
    for number in range(min(_ROUNDS, max(_LEAST_ROUNDS, _SETTINGS // (2 * digits)))):
        code = torch.randperm(n)
        for digit in range(digits):
            keep = (code >> digit) % 2 == 1
            yield number, keep
            yield number, ~keep


def _companions(x: PyTree, donors: PyTree, *, alike: bool) -> PyTree:
    """What takes the place of the draws: donors that differ from them where they can, or the same one everywhere."""
    n, many = (len(tensor_leaves(part)[0]) for part in (x, donors))
    if alike:
        return rows(donors, torch.randint(many, (1,)).expand(n))
    taken = torch.randint(many, (n,))
    for _ in range(_REDRAWN):
        same = _same_rows(x, rows(donors, taken))
        if not bool(same.any()):
            break
        taken = torch.where(same, torch.randint(many, (n,)), taken)
    return rows(donors, taken)


def _same_rows(x: PyTree, y: PyTree) -> Tensor:
    """``[n]``, on the CPU: which rows are the same in all leaves."""
    pairs = zip(tensor_leaves(x), tensor_leaves(y), strict=True)
    same = [(a == b).reshape(len(a), -1).all(1).cpu() for a, b in pairs]
    return torch.stack(same).all(0)


def _compare_means(notes: Notes, replay: Replay, x: PyTree, y: PyTree, keep: Tensor, false_alarm: float) -> None:
    """f is random in a way that cannot be repeated: compare its mean beside two sets of companions."""
    kept = keep.nonzero().flatten()
    seeds = torch.randint(2**31, (2, _PAIRS)).tolist()

    def values(draws: PyTree, chosen: list[int]) -> Tensor:
        calls = [
            replay.differentiable(draws, seed, restore=False).detach()[kept].flatten().to(replay.like)
            for seed in chosen
        ]
        return torch.stack(calls)

    first, second = values(x, seeds[0]), values(y, seeds[1])
    replay.snapshot.restore()
    test = zero_mean(first - second, false_alarm, 4 * replay.eps * float(first.abs().max()))
    if test.off:
        fact = "f is random, and its mean at a draw changed when other draws beside it were replaced."
        notes.findings.append(_interacting(fact, test.evidence))
    elif not test.valid:
        notes.unchecked[_DRAWS] = (
            f"f is random beyond repetition, and too skewed for {_PAIRS} calls: about {test.needed:.0f} "
            "would be needed. Draw its noise from the global generators, the same amount for each draw."
        )
    else:
        notes.checked[_DRAWS] = (
            f"statistical, as f is random in a way that cannot be repeated: in {_PAIRS} pairs of calls, a mean that "
            f"moves by {test.detectable:.2g} beside other draws would have been found; a change of the noise alone "
            "would not."
        )


def _interacting(fact: str, evidence: dict[str, float]) -> Finding:
    repair = (
        "Let f treat every draw by itself: no batch statistics (BatchNorm in eval mode), no ranks, no centring; "
        "subtract means by baseline=, and shape values by shape=."
    )
    return Finding(_DRAWS, fact, f"{_REASON} biased.", repair, evidence)


def _sensitivity(replay: Replay, x: PyTree, base: Tensor) -> Tensor:
    """How far f moves when the draws change by rounding."""

    def nudged(leaf: object) -> object:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            return leaf
        sign = torch.randint_like(leaf, 2) * 2 - 1
        moved = leaf * (1 + sign * torch.finfo(leaf.dtype).eps)
        return torch.where(leaf == leaf.round(), leaf, moved)  # whole numbers are not the outcome of rounding

    try:
        return (replay(pytree.tree_map(nudged, x)) - base).abs().nan_to_num().max()
    except Exception:  # f refuses draws that are not of its support
        return base.new_zeros(())


def _spread(values: Tensor) -> Tensor:
    return values.max() - values.min() if values.ndim == 1 else (values.amax(0) - values.amin(0)).max()


def _lead(keep: Tensor, values: Tensor) -> Tensor:
    return keep.reshape(-1, *[1] * (values.ndim - 1)).to(values)
