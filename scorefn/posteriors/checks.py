"""Refusals: sites, plates and supports of model and guide from which no right bound can be estimated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import torch
from pyro import poutine, validation_enabled
from pyro.distributions import Delta, Distribution, ExpandedDistribution, MaskedDistribution, Unit
from pyro.poutine.util import site_is_subsample
from pyro.util import get_rng_state, set_rng_state
from torch import Tensor
from torch.distributions import constraints

from scorefn.core import ScorefnError, ShapeError, SupportError, check_support

Site: TypeAlias = Any
Trace: TypeAlias = Any


def check_pair(guide_sites: Mapping[str, Site], model_sites: Mapping[str, Site]) -> None:
    """Refuse latents without a guide, guide sites without a latent, and plates or supports that contradict.

    Raises:
        ScorefnError: a site of one that the other lacks.
        ShapeError: a plate of another size or dimension.
        SupportError: a guide site that samples where the model has no density, or a density where it has a mass.
    """
    for name, site in guide_sites.items():
        latent = model_sites.get(name)
        if latent is not None and not latent["is_observed"]:
            _check_plates(name, site, latent)
            _check_supports(name, site["fn"], latent["fn"])
        elif not (site["is_observed"] or site["infer"].get("is_auxiliary")):
            where = "the model does not" if latent is None else "the model observes it, under the same name"
            raise ScorefnError(
                f'The guide samples "{name}" but {where}, so nothing would bound its entropy and the loss would be no '
                "bound. Sample it in the model, or drop it from the guide; a site that only helps the guide is marked "
                'infer={"is_auxiliary": True}.'
            )
    for name, site in model_sites.items():
        if site["is_observed"]:
            continue
        if name not in guide_sites:
            raise ScorefnError(
                f'The model samples "{name}" but the guide does not, so a latent of the bound has no posterior. '
                "Sample it in the guide, observe it, or hide it from the model with pyro.poutine.block."
            )


def contradiction(
    loss: str, model: Callable[..., Any], guide: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> ScorefnError | None:
    """What the refusals here have to say of a program in which Pyro met a wrong value; None: nothing.

    One more run without Pyro's validation, which stops at the first value outside a support and names no repair.
    """
    state = get_rng_state()
    try:
        guide_trace, model_trace = _traced(model, guide, args, kwargs)
        refuse_enumerated(loss, guide_trace, model_trace)
        check_pair(
            *(
                {
                    name: site
                    for name, site in trace.nodes.items()
                    if site["type"] == "sample" and not site_is_subsample(site)
                }
                for trace in (guide_trace, model_trace)
            )
        )
    except ScorefnError as refusal:
        return refusal
    except Exception:  # without validation a wrong program may fail anywhere: what Pyro said of it stands
        return None
    finally:
        set_rng_state(state)
    return None


def plate_nesting(
    model: Callable[..., Any], guide: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> int:
    """How deep plates lie in one another in a program that failed; 0 where one more run of it fails too."""
    state = get_rng_state()
    try:
        sites = [site for trace in _traced(model, guide, args, kwargs) for site in trace.nodes.values()]
    except Exception:  # as above: what Pyro said stands
        return 0
    finally:
        set_rng_state(state)
    met = [site for site in sites if site["type"] == "sample" and not site_is_subsample(site)]
    return max((-frame.dim for site in met for frame in site["cond_indep_stack"] if frame.vectorized), default=0)


def _traced(
    model: Callable[..., Any], guide: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Trace, Trace]:
    """Of guide and model, of one particle, without validation."""
    with poutine.block(), validation_enabled(False), torch.no_grad():
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
    return guide_trace, model_trace


def _check_plates(name: str, guide_site: Site, model_site: Site) -> None:
    ours, theirs = ({frame.name: frame for frame in site["cond_indep_stack"]} for site in (guide_site, model_site))
    for plate in ours.keys() & theirs.keys():
        a, b = ours[plate], theirs[plate]
        if (a.dim, a.size, a.full_size) != (b.dim, b.size, b.full_size):
            raise ShapeError(
                f'Site "{name}" lies in plate "{plate}", which the guide makes with size {a.full_size}, subsample '
                f"{a.size}, dim {a.dim}, and the model with size {b.full_size}, subsample {b.size}, dim {b.dim}: its "
                "indices would not be the same ones. Declare it alike in both."
            )


def _check_supports(name: str, guide: Any, model: Any) -> None:
    """Refuse a mass for a density, or the reverse, and a guide on an interval that is not inside the model's."""
    if isinstance(guide, Delta | Unit) or isinstance(model, Delta | Unit):
        return
    try:
        ours, theirs = _scalar(guide.support), _scalar(model.support)
        if ours is theirs:
            return
        discrete = ours.is_discrete, theirs.is_discrete
    except NotImplementedError:  # nothing is declared, so nothing can be compared
        return
    if discrete[0] != discrete[1]:
        own, other = ("discrete" if kind else "continuous" for kind in discrete)
        raise SupportError(
            f'Site "{name}" is sampled by the guide from {type(guide).__name__}, which is {own}, but in the model it '
            f"is {type(model).__name__}, which is {other}: one has a probability where the other has a density, and "
            f"log p - log q is no bound. Use a {other} guide, or a {own} latent."
        )
    inner, outer = _interval(ours), _interval(theirs)
    if inner is None or outer is None or not _outside(inner, outer):
        return
    raise SupportError(
        f'Site "{name}" is sampled by the guide from {type(guide).__name__} on {_words(inner)}, but in the model it is '
        f"{type(model).__name__} on {_words(outer)}: where the guide leaves that support, log p is -inf. Use a guide "
        f"on {_words(outer)}, for instance by a transform of pyro.distributions.transforms."
    )


def _scalar(support: Any) -> Any:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support


def _interval(support: Any) -> tuple[Any, Any] | None:
    """End points of an interval of numbers; None: something else."""
    if support is constraints.real:
        return -torch.inf, torch.inf
    if support is constraints.boolean:
        return 0, 1
    if support.event_dim or not (hasattr(support, "lower_bound") or hasattr(support, "upper_bound")):
        return None
    return getattr(support, "lower_bound", -torch.inf), getattr(support, "upper_bound", torch.inf)


def _outside(inner: tuple[Any, Any], outer: tuple[Any, Any]) -> bool:
    """Whether an end of the inner interval lies beyond that of the outer one, at any index."""
    if not any(isinstance(end, Tensor) for end in (*inner, *outer)):
        return bool(inner[0] < outer[0] or inner[1] > outer[1])
    try:
        low, high = (torch.as_tensor(a) < torch.as_tensor(b) for a, b in ((inner[0], outer[0]), (outer[1], inner[1])))
    except RuntimeError:  # end points that do not broadcast belong to shapes that are refused elsewhere
        return False
    return bool(low.any() or high.any())


def _words(interval: tuple[Any, Any]) -> str:
    low, high = (float(torch.as_tensor(end).flatten()[0]) for end in interval)
    return f"({low:g}, {high:g})" if -low == high == torch.inf else f"[{low:g}, {high:g}]"


def refuse_enumerated(loss: str, guide_trace: Trace, model_trace: Trace) -> None:
    """Refuse sites of the guide, and latents of the model, that are marked for enumeration.

    Raises:
        ScorefnError: there is such a mark, which the loss of that name would ignore.
    """
    for trace in (guide_trace, model_trace):
        for name, site in trace.nodes.items():
            if not site.get("infer") or site["type"] != "sample":
                continue  # hardly any site carries a mark
            if trace is guide_trace or not site["is_observed"]:
                check_not_enumerated(name, site, loss)


def check_not_enumerated(name: str, site: Site, loss: str) -> None:
    """Refuse a mark that the loss would ignore."""
    if site["infer"].get("enumerate") or site["infer"].get("_enumerate_dim") is not None:
        raise ScorefnError(
            f'Site "{name}" is marked infer={{"enumerate": ...}}, but {loss} samples every site and would ignore the '
            "mark. Remove it, or use pyro.infer.TraceEnum_ELBO."
        )


def refuse_estimators(guide_trace: Trace) -> None:
    """Refuse guide sites with an estimator, for a bound that is no mean over particles.

    Raises:
        ScorefnError: there is such a site.
    """
    for name, site in guide_trace.nodes.items():
        if site["type"] == "sample" and site["infer"].get("estimator") is not None:
            raise ScorefnError(
                f'Guide site "{name}" is marked infer={{"estimator": ...}}, but an estimator differentiates a mean '
                "over particles, and the log of their mean weight is none. Remove the mark, or use ScoreFunctionELBO."
            )


def refuse_hidden_samplers(guide_trace: Trace) -> None:
    """Refuse sites whose score is lost in a wrapper: their gradient would be the pathwise part alone.

    A rejection sampler is reparameterised only in part (Naesseth, Ruiz, Linderman & Blei 2017, eq. 8), and says so by
    ``score_parts``. ``to_event`` and transforms do not pass this on, so that Pyro takes the site for fully
    reparameterised.

    Raises:
        ScorefnError: there is such a site.
    """
    for name, site in guide_trace.nodes.items():
        if site["type"] != "sample" or not hasattr(site["fn"], "base_dist") or site["is_observed"]:
            continue
        if (found := _hidden_sampler(site["fn"])) is not None:
            wrapper, sampler = (type(fn).__name__ for fn in found)
            raise ScorefnError(
                f'Guide site "{name}" is {_article(wrapper)} over {sampler}, which is reparameterised only in part: '
                "besides its path it has a score, which the wrapper drops, so the gradient would be biased. Sample "
                f"{sampler} as a site of its own, in a plate instead of to_event, and transform its value; or use a "
                "distribution that is fully reparameterised, as pyro.distributions.Gamma is."
            )


def _hidden_sampler(fn: Any) -> tuple[Any, Any] | None:
    """A wrapper that loses score parts, and the distribution that has them; None: nothing is lost."""
    wrapper = None
    while fn is not None and fn.has_rsample:
        if not isinstance(fn, ExpandedDistribution | MaskedDistribution):  # these pass on what they wrap
            if getattr(type(fn), "score_parts", Distribution.score_parts) is not Distribution.score_parts:
                return None if wrapper is None else (wrapper, fn)
            wrapper = fn
        fn = getattr(fn, "base_dist", None)
    return None


def _article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "AEIOU" else f"a {noun}"


def check_trainable(names: Iterable[str], log_prob: Tensor) -> None:
    """Refuse decisions of which none has a gradient, where one is asked for.

    Args:
        names: of the sites.
        log_prob: of their decisions.

    Raises:
        ScorefnError: it does not require grad.
    """
    if log_prob.requires_grad or not torch.is_grad_enabled():
        return
    found = [f'"{name}"' for name in dict.fromkeys(names)]
    raise ScorefnError(
        f"No guide site is trainable: {', '.join(found[:10])}{', ...' if len(found) > 10 else ''} would need a score, "
        "but log q does not require grad there, so the gradient would silently be zero. Make the parameters of these "
        "sites from pyro.param or a module's parameters that require grad, without detaching them; for the value "
        "alone, call .loss(...)."
    )


def check_decision(name: str, site: Site) -> None:
    """Refuse a site that needs a score but has none, or one that would not be its gradient."""
    if site["is_observed"]:
        raise ScorefnError(
            f'Guide site "{name}" is observed but not reparameterised: it is no draw of the guide, so it has no score. '
            "Sample it, or give pyro.factor has_rsample=True if its value was made from reparameterised draws."
        )
    if getattr(site["fn"], "_mask", None) is False:
        raise ScorefnError(
            f'Guide site "{name}" is masked by .mask(False), which also removes its score, although its value is used. '
            "Mask it with pyro.poutine.mask, or with a tensor."
        )
    if isinstance(site["score_parts"].entropy_term, Tensor):
        return  # partly reparameterised: the score is of the noise, and the value carries the rest
    if site["value"].requires_grad:
        raise ScorefnError(
            f'Guide site "{name}" needs a score function, but its value requires grad: the estimate would count both '
            "gradients. Detach the value, or make the distribution fully reparameterised."
        )
    check_support(site["fn"])
