"""Independent sites with finitely many values: the families that most joint estimators serve, behind one view."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Distribution, Independent, OneHotCategorical
from torch.nn.functional import logsigmoid, one_hot

from scorefn.core import ScorefnError, nearest

FAMILIES = "Bernoulli, Categorical, OneHotCategorical, and Independent of these"
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
        named = type(p).__name__ if unit is p else f"{type(p).__name__} of {type(unit).__name__}"
        raise ScorefnError(
            f"{owner} does not serve {named}: it serves {words}. Use scorefn.expectation, which serves every "
            "distribution, or scorefn.Enumerate() where the support is finite."
        )
    return unit


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
