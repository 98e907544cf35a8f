"""A run of guide and model, recorded for an estimator: fewer frames around each site, and many densities at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.distributions.score_parts import ScoreParts
from pyro.infer.enum import get_importance_trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.replay_messenger import ReplayMessenger
from pyro.poutine.trace_messenger import TraceMessenger
from pyro.poutine.util import is_validation_enabled, prune_subsample_sites, site_is_subsample
from torch import Tensor

Trace: TypeAlias = Any
Site: TypeAlias = Any

FEW = 3  # sites of one kind from which on one operation for all of them is cheaper
LARGE = 4096  # elements of a site from which on it is not

READ_BY_LOG_PROB: dict[type, tuple[str, ...]] = {  # all that the family's log_prob reads of a distribution
    dist.Bernoulli: ("logits",),
    dist.Categorical: ("logits",),
    dist.Exponential: ("rate",),
    dist.Normal: ("loc", "scale"),
}


def recorded(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    max_plate_nesting: float,
    before: Messenger,
) -> tuple[Trace, Trace]:
    """Traces of model and guide with log-probabilities and score parts, to the bit those of Pyro.

    Sites that are made together carry no ``log_prob_sum``, which no estimate here reads.

    Args:
        model: run against the guide's values.
        guide: run first.
        args: of both.
        kwargs: of both.
        max_plate_nesting: checked where Pyro validates.
        before: meets each of the guide's sites before it has a value.
    """
    if is_validation_enabled() or isinstance(poutine.unwrap(guide), Messenger):
        pair: tuple[Trace, Trace] = get_importance_trace("flat", max_plate_nesting, model, before(guide), args, kwargs)
        return pair
    guide_trace = _Recorder(before).run(guide, args, kwargs)
    model_trace = _Recorder(ReplayMessenger(trace=guide_trace)).run(model, args, kwargs)
    guide_trace, model_trace = _pruned(guide_trace), _pruned(model_trace)
    _together(model_trace, guide_trace)
    model_trace.compute_log_prob()  # of all others
    guide_trace.compute_score_parts()
    return model_trace, guide_trace


class _Recorder(TraceMessenger):  # type: ignore[misc]
    """Pyro's trace, and what another handler does to a site before it has a value: one frame for two."""

    def __init__(self, before: Messenger) -> None:
        super().__init__()
        self._before = before._pyro_sample

    def run(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Trace:
        """The trace of one run."""
        self(fn)(*args, **kwargs)
        return self.trace

    def _process_message(self, msg: Site) -> None:
        if msg["type"] == "sample":
            self._before(msg)

    def _postprocess_message(self, msg: Site) -> None:
        if msg["type"] == "sample":
            self._pyro_post_sample(msg)
        else:
            super()._postprocess_message(msg)


def _pruned(trace: Trace) -> Trace:
    return prune_subsample_sites(trace) if any(map(site_is_subsample, trace.nodes.values())) else trace


def _together(model_trace: Trace, guide_trace: Trace) -> None:
    """Log-probabilities of sites of the same family and shape, by one operation for all of them.

    They are elementwise, and so the same to the bit (their derivatives but for rounding).
    """
    groups = dict[Any, list[tuple[bool, Site]]]()
    for trace in (model_trace, guide_trace):
        for site in trace.nodes.values():
            if site["type"] == "sample" and (kind := _kind(site)) is not None:
                groups.setdefault(kind, []).append((trace is guide_trace, site))
    for (family, *_), members in groups.items():
        if len(members) < FEW:
            continue
        whole = object.__new__(family)
        whole.__dict__["_validate_args"] = False
        for name in READ_BY_LOG_PROB[family]:
            whole.__dict__[name] = torch.stack([getattr(site["fn"], name) for _, site in members])
        log_prob = whole.log_prob(torch.stack([site["value"] for _, site in members]))
        for (in_guide, site), own in zip(members, log_prob.unbind(), strict=True):
            _fill(site, own, in_guide)


def _kind(site: Site) -> tuple[Any, ...] | None:
    """What sites have in common whose log-probabilities can be had together; None: this one stays alone."""
    fn, value = site["fn"], site["value"]
    if (names := READ_BY_LOG_PROB.get(family := type(fn))) is None or type(value) is not Tensor:
        return None
    if fn._validate_args or site["args"] or site["kwargs"] or "log_prob" in fn.__dict__:
        return None
    parameters = [getattr(fn, name) for name in names]
    first = parameters[0]
    shape, dtype, device = first.shape, first.dtype, first.device
    if value.shape != fn._batch_shape or value.device != device or first.numel() > LARGE:
        return None
    if any(other.shape != shape or other.dtype != dtype or other.device != device for other in parameters[1:]):
        return None
    return family, shape, dtype, device, value.dtype


def _fill(site: Site, log_prob: Tensor, in_guide: bool) -> None:
    """What Pyro would have written into the site."""
    scale, mask = site["scale"], site["mask"]
    plain = mask is None and isinstance(scale, float) and scale == 1
    site["unscaled_log_prob"] = log_prob
    site["log_prob"] = own = log_prob if plain else dist.util.scale_and_mask(log_prob, scale, mask)
    if in_guide:
        site["score_parts"] = ScoreParts(own, 0, own) if site["fn"].has_rsample else ScoreParts(own, log_prob, 0)
