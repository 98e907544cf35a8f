"""Whether the behaviour log-probability is that of what sampled: exactly against the measure, else by the ratios."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from scorefn.core import Draws, PyTree
from scorefn.diagnostics.audits.report import Finding, Notes
from scorefn.diagnostics.audits.testing import zero_mean

_CLAIM = "behaviour log-probability"
_RATIO = "importance ratios"
_COVER = "support that the behaviour does not cover"

_REASON = "Importance weights then have another mean than one, and every estimate from these draws is biased."
_REPAIR = (
    "Record the log-probability of exactly what was sampled, by what sampled it: the same temperature, "
    "before clipping, with the Jacobian of tanh where the squashed action is scored, summed over the event."
)


def audit_claim(notes: Notes, draws: Draws, behaviour: Any) -> None:
    """Compare the recorded log-probabilities with those of the measure that sampled, draw by draw."""
    on_policy = draws.behaviour_log_prob is None  # without weights, p itself is said to have sampled
    claimed = draws.log_prob.detach() if draws.behaviour_log_prob is None else draws.behaviour_log_prob
    true = behaviour.log_prob(draws.x)
    if not isinstance(true, Tensor) or true.shape[:1] != claimed.shape[:1]:
        notes.unchecked[_CLAIM] = "the behaviour's log_prob of these draws does not lead with N."
        return
    true = true.detach()
    if true.shape != claimed.shape:  # [N, *batch]: summed over what the draws hold as one decision
        lead = claimed.shape[:-1]
        if claimed.shape[-1] != 1 or true.shape[: len(lead)] != lead:
            notes.unchecked[_CLAIM] = (
                f"the behaviour's log_prob has shape {tuple(true.shape)}, which is not comparable with the recorded "
                f"{tuple(claimed.shape)}."
            )
            return
        true = true.reshape(*lead, -1).sum(-1, keepdim=True)
    if draws.mask is not None:
        true = torch.where(draws.mask, true, 0.0)
    difference = (true - claimed).abs()
    limit = 1e3 * max(torch.finfo(true.dtype).eps, torch.finfo(claimed.dtype).eps) * (1 + true.abs())
    wrong = ~(difference <= limit)
    if bool(wrong.any()):
        fact = (
            f"The recorded log-probability is not the behaviour's at {int(wrong.sum())} of {wrong.numel()} decisions."
        )
        evidence = {"largest difference": float(difference.nan_to_num(posinf=torch.inf).max())}
        reason, repair = _REASON, _REPAIR
        if on_policy:
            fact = (
                "The draws have no behaviour_log_prob, so that they count as draws of p, but their log_prob is not the "
                f"behaviour's at {int(wrong.sum())} of {wrong.numel()} decisions."
            )
            reason = "They get no importance weights, and every estimate is one of the behaviour's expectation."
            repair = "Record the behaviour's log-probability in behaviour_log_prob, or give the behaviour that sampled."
        notes.findings.append(Finding(_CLAIM, fact, reason, repair, evidence))
        return
    noun = "log-probabilities of draws without weights" if on_policy else "recorded ones"
    notes.checked[_CLAIM] = f"exact: {claimed.numel()} {noun} were compared with the behaviour's own."


def audit_ratios(notes: Notes, draws: Draws, false_alarm: float) -> None:
    """Test that each ratio of recorded draws has mean one, given what came before: martingale differences."""
    if draws.behaviour_log_prob is None:
        notes.unchecked[_RATIO] = "the draws are on-policy: they have no behaviour_log_prob."
        return
    log_ratio = draws.log_prob.detach() - draws.behaviour_log_prob
    _test_ratios(notes, log_ratio if draws.mask is None else log_ratio[draws.mask], false_alarm)


def audit_cover(notes: Notes, p: Any, behaviour: Any, x: PyTree, many: int, false_alarm: float) -> None:
    """Is every draw of p possible under the behaviour, and does p / behaviour average to one under the behaviour?"""
    under = behaviour.log_prob(x).detach()
    if bool((missing := torch.isneginf(under)).any()):
        fact = (
            f"{int(missing.flatten(1).any(1).sum()) if missing.ndim > 1 else int(missing.sum())} of {len(under)} draws "
        )
        fact += "of p are impossible under the behaviour."
        reason = "Draws of the behaviour never show what happens there, and no weight makes up for it."
        repair = "Sample from a behaviour whose support contains that of p, or mix some of p into it."
        evidence = {"share of the draws": float(missing.float().mean())}
        notes.findings.append(Finding(_COVER, fact, reason, repair, evidence))
        return
    notes.checked[_COVER] = f"{len(under)} draws of p are possible under the behaviour; rarer ones may not be."
    given = behaviour.sample(torch.Size((many,)))
    log_ratio = p.log_prob(given).detach() - behaviour.log_prob(given).detach()
    _test_ratios(notes, log_ratio.flatten(1).sum(1) if log_ratio.ndim > 1 else log_ratio, false_alarm)


def _test_ratios(notes: Notes, log_ratio: Tensor, false_alarm: float) -> None:
    ratio = log_ratio.flatten().double().exp()
    if bool((bad := ~ratio.isfinite()).any()):
        fact = f"{int(bad.sum())} of {len(ratio)} importance ratios are infinite or NaN."
        evidence = {"largest log-ratio": float(log_ratio.nan_to_num().max())}
        notes.findings.append(Finding(_RATIO, fact, _REASON, _REPAIR, evidence))
        return
    eps = torch.finfo(log_ratio.dtype).eps
    test = zero_mean((ratio - 1).unsqueeze(1), false_alarm, 1e3 * eps)
    if test.off:
        fact = "The importance ratios p / behaviour do not average to one."
        notes.findings.append(Finding(_RATIO, fact, _REASON, _REPAIR, test.evidence))
    elif not test.valid:
        notes.unchecked[_RATIO] = (
            f"{len(ratio)} ratios are too few or too skewed: about {test.needed:.0f} would be needed."
        )
    else:
        notes.checked[_RATIO] = (
            f"statistical, {len(ratio)} ratios: a mean that is off by {test.detectable:.2g} would have been found."
        )
