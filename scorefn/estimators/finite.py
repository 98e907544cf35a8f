"""Independent sites with finitely many values: the families that most joint estimators serve, behind one view."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Distribution, Independent, OneHotCategorical
from torch.distributions.constraints import nonnegative_integer
from torch.nn.functional import logsigmoid, one_hot

from scorefn.core import ScorefnError, nearest

FAMILIES = "Bernoulli, Categorical, OneHotCategorical, and Independent of these"
COUNTS = (
    "A count has no largest value: use the score function, scorefn.expectation, which needs none, or a Categorical "
    "over 0 .. K in its place, with K so large that little probability lies above it."
)
_FAMILIES = (Bernoulli, Categorical, OneHotCategorical)


def unwrapped(p: Distribution, owner: str, families: tuple[type, ...] = _FAMILIES, words: str = FAMILIES) -> Any:
    """The distribution of the sites, without ``Independent`` around it.

    Raises:
        ScorefnError: it is none of the families, or overrides how one of them samples; names the owner.
    """
    unit: Any = p
    while isinstance(unit, Independent):
        unit = unit.base_dist
    family, override = nearest(type(unit), families, ("sample", "log_prob"))
    if family is None or override:
        usual = (
            "Use scorefn.expectation, which serves every distribution, or scorefn.Enumerate() where the support is "
            "finite."
        )
        raise ScorefnError(
            f"{owner} does not serve {named(p)}: it serves {words}. {COUNTS if is_count(unit) else usual}"
        )
    return unit


def named(p: object) -> str:
    """The distribution in the user's words: an ``Independent`` by what is in it, and only so where it joins none."""
    unit, joined = p, 0
    while isinstance(unit, Independent):
        unit, joined = unit.base_dist, joined + unit.reinterpreted_batch_ndims
    return f"Independent of {type(unit).__name__}" if joined else type(unit).__name__


def is_count(unit: Any) -> bool:
    """Whether its values are 0, 1, 2 and so on without end, as those of a ``Poisson``."""
    try:
        return getattr(unit, "support", None) is nonnegative_integer
    except NotImplementedError:
        return False


def log_probs(unit: Any) -> Tensor:
    """``[*batch, *sites, C]``, the log-probability of each value of each site; C = 2 for ``Bernoulli``: 0 and 1."""
    if isinstance(unit, Bernoulli):
        logits: Tensor = unit.logits
        return torch.stack((logsigmoid(-logits), logsigmoid(logits)), -1)
    return unit.logits  # type: ignore[no-any-return]  # normalised


def indices(unit: Any, x: Tensor) -> Tensor:
    """``[M, *batch, *sites]``, which value each site has at the points x."""
    return x.argmax(-1) if isinstance(unit, OneHotCategorical) else x.long()


def points(unit: Any, index: Tensor) -> Tensor:
    """The points ``[M, *batch, *event]`` at which the sites have these values."""
    if isinstance(unit, OneHotCategorical):
        return one_hot(index, unit.event_shape[0]).to(unit.logits.dtype)
    return index.to(unit.logits.dtype) if isinstance(unit, Bernoulli) else index
