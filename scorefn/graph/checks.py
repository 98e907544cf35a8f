"""What a graph refuses where it is written: the fact, the reason and the repair."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

from torch import Tensor

from scorefn.core import ScorefnError, ShapeError, check_count
from scorefn.core.checks import no_part
from scorefn.graph.records import Cost, Site

State: TypeAlias = Literal["new", "open", "read", "closed", "failed"]


def check_told(num_samples: int, name: str, dist: Any, found: Collection[str], reached: Collection[str]) -> None:
    """Refuse to guess whether a distribution that Python chose leads with N."""
    if found or not reached or tuple(getattr(dist, "batch_shape", ()))[:1] != (num_samples,):
        return
    raise ScorefnError(
        f"Site {name!r} has batch shape {tuple(dist.batch_shape)}, which begins with num_samples = "
        f"{num_samples}, and was chosen by Python after {', '.join(map(repr, reached))} left the tensor graph, so "
        "that it cannot be told whether it has one distribution for each draw. Pass "
        f"given={next(iter(reached))!r} if so, and given=() if it is one distribution that is to be drawn "
        f"{num_samples} times."
    )


def check_lead(name: str, dist: Any, leader: str | None, wanted: tuple[int, ...]) -> None:
    """Refuse a distribution that does not lead with the draws of its parents."""
    batch = getattr(dist, "batch_shape", None)
    if leader is None or batch is None or tuple(batch[: len(wanted)]) == wanted:
        return
    raise ShapeError(
        f"Site {name!r} depends on site {leader!r}, so its distribution must have one member for each draw of it: "
        f"a batch shape that begins with {wanted}. But its batch shape is {tuple(batch)}. Keep the leading "
        f"dimensions of {leader!r} through the computation, and reduce over later ones only."
    )


def check_cost_shape(name: str, value: Tensor, leader: str | None, lead: tuple[int, ...], first: Cost | None) -> None:
    """Refuse a cost that does not lead with its draws, or of another batch shape than the first one."""
    if tuple(value.shape[: len(lead)]) != lead:
        because = "" if leader is None else f" because it depends on site {leader!r}"
        raise ShapeError(
            f"The cost {name!r} has shape {tuple(value.shape)}, but it must be {list(lead)} and the batch shape "
            f"*B of the problems{because}: one value per draw. Reduce over the last dimensions only, for instance "
            ".sum(-1), never over the draws; if it was reduced on purpose, say given=."
        )
    if first is not None:
        batch = value.shape[len(lead) :]
        if batch != first.batch:
            raise ShapeError(
                f"The cost {name!r} has batch shape {tuple(batch)} (shape {tuple(value.shape)} after {list(lead)}), "
                f"but the cost {first.name!r} has {tuple(first.batch)}: the problems are independent of each other, "
                "and all costs have a value for each of them. Reduce over the dimensions that are no problems, or use "
                "a graph of its own."
            )


def check_measure(name: str, dist: Any) -> None:
    """Refuse what cannot be sampled and scored."""
    if not (hasattr(dist, "sample") and hasattr(dist, "log_prob")):
        raise ScorefnError(
            f"Site {name!r} was given a {type(dist).__name__}, which is not a measure: it needs sample(sample_shape) "
            "and log_prob(x), as every torch.distributions object has them."
        )


def checked_baseline(name: str, baseline: Any) -> Any:
    """The baseline, unless it is none."""
    if isinstance(baseline, str):
        if baseline != "auto":
            raise ScorefnError(f'{name} must be a baseline object, None or "auto", but it is {baseline!r}.')
    elif baseline is not None and (not callable(baseline) or isinstance(baseline, type)):
        raise no_part("baseline", baseline, "use Constant(b) for a number, or None.")
    return baseline


def check_parts(name: str, dist: Any, number: Any, pathwise: bool, baseline: Any, estimator: Any) -> None:
    """Refuse parts of a site that do not go together."""
    if number is not None:
        check_count(f"num_samples of site {name!r}", number)
    if pathwise and not getattr(dist, "has_rsample", False):
        raise ScorefnError(
            f"Site {name!r} is asked to be pathwise, but {type(dist).__name__} has no rsample: a value that jumps has "
            "no derivative. Leave pathwise out, so that it is scored."
        )
    if baseline is not None and (pathwise or estimator is not None):
        what = "pathwise and has no score" if pathwise else "drawn by an estimator with a comparison of its own"
        raise ScorefnError(
            f"Site {name!r} has a baseline, but it is {what}, so that nothing would be subtracted. Leave one out."
        )
    if estimator is None:
        return
    for part in ("sample", "surrogate", "weights"):
        if isinstance(estimator, type) or not callable(getattr(estimator, part, None)):
            raise no_part("estimator", estimator, f"it needs {part}(), as DisARM() or Enumerate() have it.")
    if pathwise or number is not None:
        what = "pathwise=True" if pathwise else f"num_samples={number}"
        raise ScorefnError(
            f"Site {name!r} has {what} and the estimator {type(estimator).__name__}, which makes its own draws with "
            "weights of their own. Give one of them."
        )


def check_open(noun: str, name: Any, state: State) -> None:
    """Refuse a site or a cost outside the block, or after the estimate was read."""
    if state == "open":
        return
    why = {
        "new": "it was not entered",
        "read": "its estimate was read, and what comes later would be missing in it",
        "closed": "its block has ended",
        "failed": "its block ended with an error",
    }[state]
    raise ScorefnError(
        f"The {noun} {name!r} comes too late or too early for this StochasticGraph: {why}. Sample and register "
        "costs inside the block, before surrogate(); enter the graph again for the next step."
    )


def check_name(noun: str, name: Any, sites: Collection[str], costs: Collection[str]) -> None:
    """Refuse a name that is no string, or that is taken."""
    if not isinstance(name, str):
        raise ScorefnError(f"A {noun} is known by its name, a string, but {name!r} was given.")
    if name in sites or name in costs:
        taken = "site" if name in sites else "cost"
        raise ScorefnError(
            f"The name {name!r} is taken by a {taken} of this graph, and the two could not be told apart. Give "
            f"each its own name, for instance f'{name}[{{t}}]' in a loop."
        )


def check_uncoupled(name: str, estimator: Any, ancestors: Iterable[Site]) -> None:
    """Refuse an estimator downstream of another."""
    for other in ancestors:
        if other.estimator is not None:
            raise ScorefnError(
                f"Site {name!r} has the estimator {type(estimator).__name__} and depends on site {other.name!r}, "
                f"whose draws are coupled by {type(other.estimator).__name__}: an estimator needs "
                "draws of one and the same distribution. Leave the estimator of one of them out."
            )


def check_shown(name: str, dist: Any, carried: Collection[str], found: Collection[str]) -> None:
    """Refuse draws that depend on a site of which the distribution shows nothing."""
    if strangers := [other for other in carried if other not in found]:
        raise ScorefnError(
            f"The draws of site {name!r} depend on site {strangers[0]!r}, which does not show in the tensors of "
            f"its {type(dist).__name__}, so that its layout cannot be told. Pass given={strangers[0]!r}."
        )


def check_real(name: str, value: Any) -> None:
    """Refuse a cost that is no tensor of real numbers."""
    if not isinstance(value, Tensor) or value.is_complex():
        what = f"complex ({value.dtype})" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise ScorefnError(
            f"The cost {name!r} is {what}, but it must be a tensor of one real number per draw, [N, *B], by which "
            "its dependencies can be followed. Use torch.stack, or the real part."
        )


def checked_declaration(dependencies: Any) -> dict[str, Sequence[str]]:
    """The dependencies as the user declared them: names by name."""
    if not isinstance(dependencies, Mapping) or any(isinstance(names, str) for names in dependencies.values()):
        raise ScorefnError(
            f"dependencies must map each site or cost to a sequence of names, but it is {dependencies!r}. Write "
            'dependencies={"h": ["z"], "nll": ["h"]}, or leave it out to have them tracked.'
        )
    return dict(dependencies)
