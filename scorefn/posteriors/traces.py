"""From Pyro's traces of model and guide to decisions, values and their program.

A decision is an element of a guide site that is not, or not fully, reparameterised; a value is an element of log p of a
model site or of -log q of a guide site. ``scale`` (subsampling) and ``mask`` are in the values, never in the score.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from scorefn.core import ScorefnError, ShapeError
from scorefn.posteriors.checks import check_decision, check_pair
from scorefn.posteriors.hints import Hint
from scorefn.posteriors.joint_sites import JOINT, JointSite
from scorefn.posteriors.plates import Plate, Plates

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
