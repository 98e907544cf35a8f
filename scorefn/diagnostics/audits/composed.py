"""The audit of a problem: every check that its parts allow, and a list of those they do not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from scorefn.core import (
    Baseline,
    ControlVariate,
    Coupling,
    Draws,
    Integrand,
    LeaveOneOut,
    Measure,
    PyTree,
    ScorefnError,
    StructuredMeasure,
    SupportError,
    check_count,
    draw,
)
from scorefn.diagnostics.audits.arguments import check_arguments, checked_parameters
from scorefn.diagnostics.audits.behaviour import audit_claim, audit_cover, audit_ratios
from scorefn.diagnostics.audits.direct_gradient import audit_direct_gradient
from scorefn.diagnostics.audits.expected_h import audit_expected_h
from scorefn.diagnostics.audits.interaction import audit_draws_apart, audit_number_of_draws, audit_problems_apart
from scorefn.diagnostics.audits.own_draw import OWN_FEATURES, audit_baseline, audit_control_variate
from scorefn.diagnostics.audits.own_features import audit_own_features
from scorefn.diagnostics.audits.preservation import Snapshot
from scorefn.diagnostics.audits.problem import Problem
from scorefn.diagnostics.audits.programs import audit_program
from scorefn.diagnostics.audits.replay import Replay, rows
from scorefn.diagnostics.audits.report import AuditReport, Finding, Notes
from scorefn.diagnostics.audits.scores import audit_finite_support, audit_scores
from scorefn.reducers.optimal_constant import leaves
from scorefn.tracking.audit import Program
from scorefn.tracking.generators import generators_restored

_TESTS = 8  # sampling tests that share the false alarm


def audit(
    p: Measure | StructuredMeasure,
    f: Integrand,
    params: Tensor | Iterable[Tensor] | None = None,
    *,
    num_samples: int = 8,
    coupling: Coupling | None = None,
    baseline: Baseline | Literal["auto"] | None = "auto",
    control_variate: ControlVariate | None = None,
    draws: Draws | None = None,
    behaviour: Measure | None = None,
    program: Program | None = None,
    claimed: Tensor | None = None,
    repeats: int = 16_384,
    trials: int = 20,
    false_alarm: float = 1e-6,
) -> AuditReport:
    """Look for what makes a score-function estimate wrong on your own problem, without an error.

    * **f whose draws or problems interact** (batch normalisation, ranks, centring): others are replaced beside a draw,
      in their places, and its value may not move. Also f that depends on the number of draws, that changes them in
      place, or that depends on a parameter unseen by autograd.
    * **a baseline that depends on its own draw**: value, log-probability and x of a draw and its block are replaced,
      and its baseline may not move, nor the correction of a control variate, whose ``E h`` is tested too.
    * **a support that moves, a log_prob that is not normalised or not the sampler's**: by the declared type; exactly
      by ``sum p = 1`` and its gradient where the support is finite; by a test of ``E[grad log p] = 0`` for all.
    * **a behaviour log-probability that is not the sampler's**: exactly against ``behaviour``, and by a test that
      ``E[p / behaviour] = 1`` for each decision, given those before.
    * **a program whose claimed dependencies are false**: by ``scorefn.tracking.audit``, which is about one program
      alone and has a report of its own.

    Replays repeat all random numbers and put all states back; what is random all the same is tested. Tests are z-tests
    with 1000 squared skewnesses of terms at least: with fewer, the check is listed as not made. Parameters, gradients,
    modules, generators and learners are left bit for bit as they were; environments move on as by ordinary draws. A
    copy of every tensor that f, p and the learners hold is kept meanwhile.

    Args:
        p: the distribution or measure, built from the parameters.
        f: the integrand, x ``[N, *batch, *event]`` to ``[N, *B]``, or of a structured measure's record.
        params: what is differentiated; None: every leaf that log_prob was computed from.
        num_samples: N, at least 2.
        coupling: as in ``scorefn.expectation``.
        baseline: likewise; "auto" is leave-one-out.
        control_variate: likewise.
        draws: your own draws, made elsewhere (replay, another process), in place of fresh ones.
        behaviour: the measure that they were sampled from.
        program: called with a ledger, as in ``scorefn.tracking.audit``.
        claimed: ``[K, J]`` bool, what the program's values depend on.
        repeats: draws that sampling tests take, fewer where a draw is large.
        trials: settings of the program that are perturbed.
        false_alarm: of all sampling tests together.

    Returns:
        An ``AuditReport``: what was found, what was checked and how strongly, and what was not.

    Raises:
        ScorefnError: an argument that cannot play its part, or a call inside a ``torch.func`` transform. What the
            library would refuse in the estimate itself is a finding.
        ShapeError: claimed is not ``[K, J]``.

    Example:
        >>> import torch
        >>> from scorefn.diagnostics import audit
        >>> _ = torch.manual_seed(0)
        >>> logits = torch.zeros(3, requires_grad=True)
        >>> p = torch.distributions.Bernoulli(logits=logits)
        >>> bool(audit(p, lambda x: x.sum(-1)))
        True
        >>> report = audit(p, lambda x: x.sum(-1) - x.sum(-1).mean())
        >>> [finding.name for finding in report.findings]
        ['interacting draws']
    """
    check_arguments(p, f, coupling, baseline, control_variate, draws, behaviour, program, claimed, false_alarm)
    if check_count("num_samples", num_samples) < 2 and draws is None:
        raise ScorefnError("num_samples must be at least 2, because a draw is replaced beside others, but it is 1.")
    parameters = None if params is None else checked_parameters(params)
    repeats, trials = check_count("repeats", repeats), check_count("trials", trials)
    problem = Problem(p, f, num_samples, coupling, draws, parameters, repeats)
    snapshot = Snapshot([f, parameters, coupling, behaviour, program, *problem.held()], [baseline, control_variate])
    notes, share = Notes(), false_alarm / _TESTS
    with generators_restored(), torch.enable_grad():
        try:
            _examine(notes, problem, snapshot, baseline, control_variate, share)
            _examine_behaviour(notes, problem, behaviour, share)
            if program is None or claimed is None:
                notes.unchecked["claimed dependencies"] = "no program and claimed were given."
            else:
                audit_program(notes, program, claimed, trials)
        finally:
            snapshot.restore()
    return notes.report()


def _examine(
    notes: Notes, problem: Problem, snapshot: Snapshot, baseline: Any, control_variate: Any, share: float
) -> None:
    """Everything about p, f and what reduces their variance."""
    made = _first_draws(notes, problem, snapshot)
    if made is None and problem.structured:
        notes.unchecked["everything else"] = "the measure made no draws."
        return
    x = problem.plain_sample(problem.num_samples) if made is None else made.x
    log_prob = problem.p.log_prob(x) if made is None else made.log_prob
    parameters = problem.parameters or tuple(q for q in leaves(log_prob) if q.requires_grad)
    snapshot.include(parameters)
    donors = problem.donors(x)
    _examine_integrand(
        notes, problem, Replay(problem.f, log_prob.detach(), snapshot, _seed()), x, donors, parameters, share
    )
    if not parameters:
        notes.unchecked["scores"] = "log_prob was computed from no tensor that requires grad."
    elif problem.structured:
        audit_scores(notes, partial(_structured_batches, problem, snapshot), parameters, share)
    else:
        many = problem.plain_sample(problem.many(x))
        audit_scores(notes, partial(_plain_batch, problem, many), parameters, share)
        audit_finite_support(notes, problem.p, many, parameters, share)
    _examine_reducers(notes, problem, snapshot, made, baseline, control_variate, parameters, share)


def _examine_integrand(
    notes: Notes,
    problem: Problem,
    replay: Replay,
    x: PyTree,
    donors: PyTree,
    parameters: tuple[Tensor, ...],
    share: float,
) -> None:
    try:
        values = replay(x)
        if values.ndim == 0 or len(values) != len(replay.like):
            raise ScorefnError(f"it returned shape {tuple(values.shape)} for {len(replay.like)} draws")
    except ScorefnError as error:
        if not notes.findings:
            notes.findings.append(_refusal(error))
        notes.unchecked["f"] = f"f was refused, so its draws were not told apart: {error}"
        return
    if not bool(values.isfinite().all()):
        notes.unchecked["f"] = "its values are NaN or infinite, and cannot be compared."
        return
    audit_draws_apart(notes, replay, x, donors, share)
    audit_number_of_draws(notes, replay, [x, rows(x, torch.randperm(len(values)))])
    if problem.structured or problem.given is not None:
        notes.unchecked["values and decisions"] = (
            "whether a value depends on no decisions but those it is charged to is left to a program and claimed."
        )
    else:
        audit_problems_apart(notes, replay, x, donors)
    if parameters:
        plain = not problem.structured and problem.given is None
        more = partial(problem.plain_sample, problem.many(x)) if plain else lambda: x
        audit_direct_gradient(notes, replay, x, more, parameters, share)


def _examine_reducers(
    notes: Notes,
    problem: Problem,
    snapshot: Snapshot,
    made: Draws | None,
    baseline: Any,
    control_variate: Any,
    parameters: tuple[Tensor, ...],
    share: float,
) -> None:
    if baseline == "auto":
        baseline = LeaveOneOut() if made is None or made.num_blocks > 1 else None
    for name, part in (("baseline", baseline), ("control variate", control_variate)):
        if part is None or made is None:
            notes.unchecked[name] = "none was given." if part is None else "the draws were refused."
    if made is None or (baseline is None and control_variate is None):
        return
    donors = _donors(problem, snapshot, made)
    if baseline is not None and control_variate is None:
        audit_baseline(notes, baseline, made, donors, snapshot, _seed())
    elif baseline is not None:
        seen = control_variate(made)
        snapshot.restore()
        audit_baseline(notes, baseline, replace(seen, fitted=False), donors, snapshot, _seed())
    if OWN_FEATURES in notes.unchecked and parameters:
        batches = [made] if problem.given is not None else problem.rounds(snapshot)
        audit_own_features(notes, baseline, batches, parameters, snapshot, share)
    if control_variate is None:
        return
    audit_control_variate(notes, control_variate, made, donors, snapshot, _seed())
    if problem.structured or problem.given is not None or not parameters:
        notes.unchecked["expectation of the control variate"] = "the measure is structured, or the draws were given."
        return
    try:
        many = draw(problem.p, problem.f, problem.many(made.x))
    except Exception as error:  # whatever f raises for another number of draws
        notes.unchecked["expectation of the control variate"] = f"f takes no more draws ({type(error).__name__})."
        return
    finally:
        snapshot.restore()
    audit_expected_h(notes, control_variate, many, parameters, snapshot, share)


def _examine_behaviour(notes: Notes, problem: Problem, behaviour: Any, share: float) -> None:
    if problem.given is None and behaviour is None:
        notes.unchecked["behaviour log-probability"] = "no draws and no behaviour were given."
        return
    if problem.given is not None:
        audit_ratios(notes, problem.given, share)
    if behaviour is None:
        notes.unchecked["behaviour log-probability"] = "no behaviour was given to compare with, draw by draw."
        return
    if problem.given is not None:
        audit_claim(notes, problem.given, behaviour)
    elif problem.structured:
        notes.unchecked["behaviour log-probability"] = "a structured measure's draws have to be given (draws=)."
    else:
        x = problem.plain_sample(problem.many(problem.plain_sample(1)))
        audit_cover(notes, problem.p, behaviour, x, problem.repeats, share)


def _first_draws(notes: Notes, problem: Problem, snapshot: Snapshot) -> Draws | None:
    if problem.given is not None:
        return problem.given
    try:
        return problem.draws()
    except SupportError as error:
        fact = f"The support of {type(problem.p).__name__} moves with a parameter that requires grad."
        reason = "The boundary's share of the gradient is seen by no score."
        notes.findings.append(Finding("support that moves", fact, reason, str(error).partition("silently. ")[2], {}))
    except ScorefnError as error:
        notes.findings.append(_refusal(error))
    finally:
        snapshot.restore()
    return None


def _refusal(error: ScorefnError) -> Finding:
    return Finding("refused", str(error), "", "Repair what the message names: an estimate raises the same.", {})


def _donors(problem: Problem, snapshot: Snapshot, made: Draws) -> Draws:
    """Other draws of the same shapes, whose values differ from those they replace, whatever f is."""
    donors = made[torch.arange(len(made)).roll(_largest_block(made))]
    if problem.given is None and not problem.structured:
        donors = problem.draws()
        snapshot.restore()
    shift = 1 + 2 * made.fx.detach().abs().max()
    return replace(donors, fx=donors.fx.detach() + shift)


def _largest_block(draws: Draws) -> int:
    return 1 if draws.block is None else int(torch.unique(draws.block, return_counts=True)[1].max())


def _plain_batch(problem: Problem, x: PyTree) -> Iterator[tuple[Tensor, Tensor | None]]:
    log_prob = problem.p.log_prob(x)
    yield log_prob.flatten(1).sum(1) if log_prob.ndim > 1 else log_prob, None


def _structured_batches(problem: Problem, snapshot: Snapshot) -> Iterator[tuple[Tensor, Tensor | None]]:
    for drawn in problem.rounds(snapshot):
        if drawn.behaviour_log_prob is not None:
            raise RuntimeError("the draws are off-policy, where scores have another mean")
        yield drawn.log_prob, drawn.mask


def _seed() -> int:
    return int(torch.randint(2**31, ()))
