"""All particles of one estimate: the columns of every site that a run visits, and who is charged with what."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from scorefn.core import Draws, NonFiniteError, ScorefnError
from scorefn.posteriors.checks import check_trainable
from scorefn.posteriors.coefficients import Columns
from scorefn.posteriors.hints import Hint, HintedColumns
from scorefn.posteriors.joint_sites import JointColumns
from scorefn.posteriors.plate_credit import PlateCredit
from scorefn.posteriors.plates import Block, Plates, Step, assembled
from scorefn.posteriors.programs import Program
from scorefn.posteriors.traces import Elements, Key, Outline, Run


@dataclass(frozen=True)
class Particles:
    """All particles of one estimate, before they become Draws: a guide may have no decision at all.

    Args:
        samples: guide values ``[N, ...]`` of the sites that every particle has.
        log_prob: ``[N, K]``, or None without a decision.
        fx: ``[N, J]``.
        mask: ``[N, K]`` bool where particles took different branches, otherwise None.
        credit: program order and plates.
        decisions: the columns of each site's decisions, by its name.
        values: the columns of each site's values.
        hints: the baselines that the guide gives to its own sites.
        joint: the sites whose particles were drawn together.
    """

    samples: dict[str, Tensor]
    log_prob: Tensor | None
    fx: Tensor
    mask: Tensor | None
    credit: PlateCredit
    decisions: tuple[Columns, ...] = ()
    values: tuple[Columns, ...] = ()
    hints: tuple[HintedColumns, ...] = ()
    joint: tuple[JointColumns, ...] = ()

    @property
    def pathwise(self) -> bool:
        """Whether no decision can move: all are reparameterised, or fixed while other parameters learn."""
        if self.log_prob is None:
            return True
        return self.fx.requires_grad and not self.log_prob.requires_grad

    def draws(self) -> Draws:
        """The Draws of the ELBO.

        Raises:
            ScorefnError: the guide has no decision, or sites with an estimator; or as ``Draws``.
            NonFiniteError: log p or log q is NaN or infinite; the site is named.
        """
        if self.log_prob is None:
            raise ScorefnError(
                "Every site of the guide is reparameterised, so there is no decision and no score. The loss itself "
                "needs no Draws: call differentiable_loss, or mark a site with fn.has_rsample_(False)."
            )
        if self.joint:
            raise ScorefnError(
                f'Site "{self.joint[0].site.name}" has an estimator, whose draws are made and weighed together, and '
                "Draws hold one score for each draw. Call differentiable_loss, or take the estimator off the site."
            )
        check_trainable(self.scored, self.log_prob)
        try:
            return Draws(self.samples, self.log_prob, self.fx, credit=self.credit, mask=self.mask)
        except NonFiniteError as error:
            raise self.not_finite() or error from None

    @property
    def scored(self) -> Iterator[str]:
        """Names of the sites that need a score."""
        return (name for (_, name, _), _, _ in self.decisions)

    def not_finite(self) -> NonFiniteError | None:
        """What to say of the first site whose log p, log q or score is NaN or infinite; None: there is none."""
        for tensor, sites in ((self.fx, self.values), (self.log_prob, self.decisions)):
            if tensor is None:
                continue
            for (kind, name, _), start, size in sites:
                own = tensor.detach()[:, start : start + size]
                if bool((finite := torch.isfinite(own)).all()):
                    continue
                bad = (~finite.all(-1)).nonzero().flatten().tolist()
                what = {"log p": "log p", "log q": "-log q", "score": "the score's log q"}[kind]
                return NonFiniteError(
                    f'Site "{name}": {what} is {own[~finite][0].item()} at {len(bad)} of {len(own)} particles, namely '
                    f"{bad[:10]}{' ...' if len(bad) > 10 else ''}: it would make the whole gradient NaN. Every sample "
                    "of the guide must lie inside the model's support, with parameters that are finite there."
                )
        return None


def gather(runs: list[Run]) -> Particles:
    """Stack runs along N; each site's elements get columns of their own, shared by the runs that visit it."""
    decisions = [[stage.decision for stage in run.stages if stage.decision is not None] for run in runs]
    values = [run.constants + [value for stage in run.stages for value in stage.values] for run in runs]
    outlines = [run.outline for run in runs]
    layout = _layout(tuple(dict.fromkeys(outlines)))
    decision_start, value_start = layout.decisions, layout.values
    num_decisions, num_values = layout.num_decisions, layout.num_values
    fx = _stacked(values, value_start, num_values)
    log_prob = mask = None
    if num_decisions:
        log_prob = _stacked(decisions, decision_start, num_decisions)
        if log_prob.dtype != fx.dtype:
            dtype = torch.promote_types(log_prob.dtype, fx.dtype)
            log_prob, fx = log_prob.to(dtype), fx.to(dtype)
        if any(len(row) < len(decision_start) for row in decisions):
            mask = torch.zeros(log_prob.shape, dtype=torch.bool, device=log_prob.device)
            for number, row in enumerate(decisions):
                for elements in row:
                    start = decision_start[elements.key]
                    mask[number, start : start + elements.value[0].numel()] = True
    which = None
    if len(layout.programs) > 1:
        which = torch.tensor([layout.number[outline] for outline in outlines], device=fx.device)
    credit = PlateCredit(layout.programs, num_decisions, num_values, which)
    return Particles(
        _common([run.samples for run in runs]),
        log_prob,
        fx,
        mask,
        credit,
        layout.decision_columns,
        layout.value_columns,
        _hints(runs, decision_start, len(fx)),
        tuple(
            JointColumns(stage.joint, decision_start[stage.decision.key], math.prod(stage.decision.shape))
            for run in runs
            for stage in run.stages
            if stage.joint is not None and stage.decision is not None
        ),
    )


def _hints(runs: list[Run], start: dict[Key, int], num_particles: int) -> tuple[HintedColumns, ...]:
    """The hints of all runs, one for each hinted key."""
    together = num_particles // len(runs)
    found: dict[Key, dict[int, tuple[Hint, tuple[int, ...]]]] = {}
    for number, run in enumerate(runs):
        for stage in run.stages:
            if stage.hint is not None and stage.decision is not None:
                found.setdefault(stage.decision.key, {})[number] = stage.hint, stage.decision.shape
    hinted = []
    for key, by_run in found.items():
        hint, shape = next(iter(by_run.values()))
        predictions = {number: hint.columns(shape, together) for number, (hint, shape) in by_run.items()}
        rows = torch.tensor([number in by_run for number in range(len(runs))]).repeat_interleave(together)
        predicted = None
        if any(value is not None for value in predictions.values()):
            like = next(value for value in predictions.values() if value is not None)
            parts = [predictions.get(number) for number in range(len(runs))]
            size = math.prod(shape)
            predicted = torch.cat(
                [like.new_zeros(together, size) if part is None else part.expand(together, size) for part in parts]
            )
        hinted.append(HintedColumns(hint.site, start[key], shape, rows, predicted, hint.decay))
    return tuple(hinted)


@dataclass(frozen=True)
class _Layout:
    """The first column of each key, in order of first appearance, and the program of each outline."""

    decisions: dict[Key, int]
    values: dict[Key, int]
    num_decisions: int
    num_values: int
    programs: tuple[Program, ...]
    number: dict[Outline, int]
    decision_columns: tuple[Columns, ...]
    value_columns: tuple[Columns, ...]


@lru_cache(maxsize=64)
def _layout(outlines: tuple[Outline, ...]) -> _Layout:
    decisions, num_decisions = _starts(
        decision[0] for outline in outlines for _, decision, _ in outline.stages if decision is not None
    )
    values, num_values = _starts(
        key
        for outline in outlines
        for key in (*outline.constants, *(key for _, _, values in outline.stages for key, _ in values))
    )
    numbers: dict[Program, int] = {}
    number = {outline: numbers.setdefault(_program(outline, decisions, values), len(numbers)) for outline in outlines}
    return _Layout(
        decisions,
        values,
        num_decisions,
        num_values,
        tuple(numbers),
        number,
        _columns(decisions),
        _columns(values),
    )


def _columns(start: dict[Key, int]) -> tuple[Columns, ...]:
    return tuple(Columns(key, first, math.prod(key[2])) for key, first in start.items())


def _starts(keys: Iterable[Key]) -> tuple[dict[Key, int], int]:
    """The first column of each key, and the number of columns."""
    start, end = dict[Key, int](), 0
    for key in keys:
        if key not in start:
            start[key] = end
            end += math.prod(key[2])
    return start, end


def _program(outline: Outline, decision_start: dict[Key, int], value_start: dict[Key, int]) -> Program:
    depth = max((len(key[2]) for _, _, values in outline.stages for key, _ in values), default=0)

    def block(key: Key, plates: Plates, start: dict[Key, int]) -> Block:
        return Block(start[key], (1,) * (depth - len(key[2])) + key[2], plates)

    steps = tuple(
        Step(
            plates,
            None if decision is None else block(*decision, decision_start),
            tuple(block(*value, value_start) for value in values),
        )
        for plates, decision, values in outline.stages
    )
    reach = None if outline.influence is None else outline.influence.reach(outline)
    return Program(steps, depth, reach)


def _stacked(rows: list[list[Elements]], start: dict[Key, int], columns: int) -> Tensor:
    """``[N, columns]``, with zeros where a run does not visit a site."""
    if len(rows) == 1:
        return _row(rows[0], start, columns)
    return torch.cat([_row(row, start, columns) for row in rows])


def _row(row: list[Elements], start: dict[Key, int], columns: int) -> Tensor:
    if row and len(row[0].value) == 1:  # a view of each would cost more than all numbers
        alone = {start[elements.key]: _flat(elements.value) for elements in row}
        return assembled(alone, next(iter(alone.values())), columns).unsqueeze(0)
    parts = {start[elements.key]: elements.columns for elements in row}
    like = row[0].columns if row else torch.zeros(1, 0)
    return assembled(parts, like, columns) if parts else like.new_zeros(1, columns)


def _flat(value: Tensor) -> Tensor:
    return value if value.ndim == 1 else value.reshape(-1)


def _common(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    first, *others = samples
    if not others:
        return first
    return {
        name: torch.cat([run[name] for run in samples])
        for name, value in first.items()
        if all(name in run and run[name].shape == value.shape for run in others)
    }
