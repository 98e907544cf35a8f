"""From Pyro's traces of model and guide to decisions, values and their program.

A decision is an element of a guide site that is not, or not fully, reparameterised; a value is an element of log p of a
model site or of -log q of a guide site. ``scale`` (subsampling) and ``mask`` are in the values, never in the score.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from scorefn.core import Draws, NonFiniteError, ScorefnError, ShapeError
from scorefn.posteriors.checks import check_decision, check_pair, check_trainable
from scorefn.posteriors.coefficients import Columns
from scorefn.posteriors.hints import Hint, HintedColumns
from scorefn.posteriors.joint_sites import JOINT, JointColumns, JointSite
from scorefn.posteriors.plates import Block, Plate, PlateCredit, Plates, Program, Step, assembled

if TYPE_CHECKING:
    from scorefn.posteriors.dependencies import SiteInfluence

PARTICLES = "num_particles_vectorized"  # the plate that Pyro wraps around model and guide

Trace: TypeAlias = Any
Site: TypeAlias = Any
Key: TypeAlias = tuple[str, str, tuple[int, ...]]

_NOWHERE: Plates = frozenset()


@dataclass(frozen=True)
class Elements:
    """The elements of one site: a tensor ``[N, *shape]`` and the plates of its dimensions."""

    key: Key
    value: Tensor
    plates: Plates

    @property
    def shape(self) -> tuple[int, ...]:
        """Extents without N."""
        return tuple(self.value.shape[1:])

    @property
    def columns(self) -> Tensor:
        """``[N, size]``."""
        return self.value if self.value.ndim == 2 else self.value.reshape(len(self.value), -1)


@dataclass(frozen=True)
class Stage:
    """One guide site: the plates inside which it stays, its decision, the values of its level.

    It may have a baseline of its own, or draws that were made together.
    """

    plates: Plates
    decision: Elements | None
    values: list[Elements]
    hint: Hint | None = None
    joint: JointSite | None = None


class Outline(NamedTuple):
    """What a run has in common with others of the same static program, apart from all numbers."""

    stages: tuple[tuple[Plates, tuple[Key, Plates] | None, tuple[tuple[Key, Plates], ...]], ...]
    constants: tuple[Key, ...]
    influence: SiteInfluence | None


@dataclass(frozen=True)
class Run:
    """One pair of traces, N particles that ran together (1 unless vectorised).

    Args:
        stages: guide sites in program order.
        constants: values that no guide site precedes.
        samples: the value of each guide site, ``[N, *batch, *event]``, detached.
        influence: what each guide site can influence at most; None: all that comes later.
    """

    stages: list[Stage]
    constants: list[Elements]
    samples: dict[str, Tensor]
    influence: SiteInfluence | None = None

    @cached_property
    def outline(self) -> Outline:
        """Everything but the numbers."""
        stages = tuple(
            (
                stage.plates,
                None if stage.decision is None else (stage.decision.key, stage.decision.plates),
                tuple((value.key, value.plates) for value in stage.values),
            )
            for stage in self.stages
        )
        return Outline(stages, tuple(value.key for value in self.constants), self.influence)


def read_run(model_trace: Trace, guide_trace: Trace, num_together: int, order: int | None = None) -> Run:
    """Decisions and values of one pair of traces whose log-probabilities and score parts are computed.

    Args:
        model_trace: of the model against the guide's values.
        guide_trace: of the guide.
        num_together: how many particles ran together.
        order: how often the estimate will be differentiated at most; None: any number of times.

    Raises:
        ScorefnError: what this estimator would get wrong: enumerated sites, observed guide sites, latents without a
            guide and guide sites without a latent.
        ShapeError: plates of guide and model contradict, or a site does not broadcast over the particles.
        SupportError: the support of a decision moves with a parameter, or leaves the model's.
    """
    guide_sites = dict(_sample_sites(guide_trace))
    model_sites = dict(_sample_sites(model_trace))
    check_pair(guide_sites, model_sites)
    position = {name: index for index, name in enumerate(guide_sites)}
    around = {name: _plates(site) for name, site in model_sites.items()}
    entropy = _entropy(guide_sites, order)
    stages = []
    for name, site in guide_sites.items():
        stays = plates = _plates(site)
        if (others := around.get(name)) is not None and others != plates:
            stays = plates & others
        own = _elements(site, "log q", entropy[name], plates, num_together)
        decision = None
        if isinstance(score := site["score_parts"].score_function, Tensor):
            check_decision(name, site)
            decision = _elements(site, "score", score, stays, num_together)
        stages.append(Stage(stays, decision, [own], _hint(site), _joint(site, decision)))

    level, constants = -1, list[Elements]()
    for name, site in model_sites.items():
        if not site["is_observed"]:
            level = max(level, position[name])
        elements = _elements(site, "log p", site["log_prob"], around[name], num_together)
        (constants if level < 0 else stages[level].values).append(elements)
    samples = {name: _sample(site, num_together) for name, site in guide_sites.items() if not site["is_observed"]}
    return Run(stages, constants, samples)


def _sample_sites(trace: Trace) -> Iterator[tuple[str, Site]]:
    return ((name, site) for name, site in trace.nodes.items() if site["type"] == "sample")


def _hint(site: Site) -> Hint | None:
    """The site's own baseline, as it was read when the site was reached (``HintReader``)."""
    hint: Hint | None = site.get("scorefn_baseline")
    if hint is None and site["infer"].get("baseline"):
        raise ScorefnError(
            f'Guide site "{site["name"]}" carries infer={{"baseline": ...}}, which only ScoreFunctionELBO reads: this '
            "loss has no baseline of single sites. Remove the mark, or use that loss."
        )
    return hint


def _joint(site: Site, decision: Elements | None) -> JointSite | None:
    """The site's joint draws, where an estimator made them (``JointReader``)."""
    joint: JointSite | None = site.get(JOINT)
    if joint is not None and (decision is None or isinstance(site["score_parts"].entropy_term, Tensor)):
        raise ScorefnError(
            f'Guide site "{site["name"]}" has an estimator, but {type(site["fn"]).__name__} is reparameterised, and an '
            "estimator would drop its pathwise gradient. Take the estimator off the site."
        )
    return joint


def _plates(site: Site) -> Plates:
    """The vectorised plates around a site, apart from the particles'."""
    if not site["cond_indep_stack"]:
        return _NOWHERE
    return frozenset(
        Plate(frame.name, frame.dim, frame.size)
        for frame in site["cond_indep_stack"]
        if frame.vectorized and frame.name != PARTICLES
    )


def _elements(site: Site, kind: str, value: Tensor, plates: Plates, num_together: int) -> Elements:
    """``[N, *shape]``; a plate along whose dimension the value does not extend cannot keep its indices apart."""
    name: str = site["name"]
    if num_together == 1:
        value = value.unsqueeze(0)
    elif value.ndim != _batch_dims(site) or value.shape[0] != num_together:
        raise ShapeError(
            f'Site "{name}" has log-probabilities {tuple(value.shape)}, where the {num_together} particles should come '
            "first: with vectorize_particles=True every site must broadcast over an outermost plate. Set "
            "vectorize_particles=False, or a max_plate_nesting as large as the model's deepest plate."
        )
    shape = tuple(value.shape[1:])
    depth, present = len(shape), plates
    for plate in plates:
        if -plate.dim > depth or shape[plate.dim] != plate.size:
            present = present - {plate}
    return Elements((kind, name, shape), value, present)


def _batch_dims(site: Site) -> int:
    """How many batch dimensions a site has where particles run together: theirs is the outermost."""
    return next((-frame.dim for frame in site["cond_indep_stack"] if frame.name == PARTICLES), -1)


def _sample(site: Site, num_together: int) -> Tensor:
    """``[N, *batch, *event]``, detached."""
    value: Tensor = site["value"].detach()
    if num_together == 1:
        return value.unsqueeze(0)
    missing = _batch_dims(site) + site["fn"].event_dim - value.ndim
    value = value.reshape((1,) * missing + tuple(value.shape))
    return value.expand(num_together, *value.shape[1:])


def _entropy(guide_sites: dict[str, Site], order: int | None) -> dict[str, Tensor]:
    """-log q of each site, scaled and masked; that of a decision that is not reparameterised at all, silenced.

    To first order what is silenced is a constant, but for a scale that learns.
    """
    entropy, by_shape = dict[str, Tensor](), dict[torch.Size, list[str]]()
    for name, site in guide_sites.items():
        log_q, entropy_term = site["score_parts"].score_function, site["score_parts"].entropy_term
        if not isinstance(log_q, Tensor) or isinstance(entropy_term, Tensor):
            entropy[name] = -site["log_prob"]
        elif order == 1 and not (isinstance(site["scale"], Tensor) and site["scale"].requires_grad):
            entropy[name] = -site["log_prob"].detach()
        else:
            by_shape.setdefault(log_q.shape, []).append(name)
    for names in by_shape.values():  # many sites in one operation
        together = _silent(torch.stack([guide_sites[name]["score_parts"].score_function for name in names])).unbind()
        for name, value in zip(names, together, strict=True):
            site = guide_sites[name]
            scaled: Tensor = value if isinstance(site["scale"], float) and site["scale"] == 1 else site["scale"] * value
            for mask in (site["mask"], getattr(site["fn"], "_mask", None)):
                if mask is not None:
                    scaled = torch.where(torch.as_tensor(mask, device=scaled.device), scaled, 0.0)
            entropy[name] = scaled - site["log_prob"]
    return entropy


def _silent(log_q: Tensor) -> Tensor:
    """What takes the first-order gradient off -log q without touching its value or any expected derivative.

    The gradient of -log q of a decision has expectation zero, and is noise that would remain where the bound is tight.
    With u = log q - stop(log q), ``1 - exp(-u)`` has value 0 and the opposite gradient; and since exp(u) is the
    decision's weight in ``dice``, ``E[exp(u) (1 - exp(-u))] = E[exp(u)] - 1 = 0`` leaves every derivative alone.
    """
    return 1 - (log_q.detach() - log_q).exp()


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
