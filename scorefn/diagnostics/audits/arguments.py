"""What ``audit`` refuses to begin with."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from scorefn.core import Draws, ScorefnError, in_transform
from scorefn.diagnostics.estimation import as_parameters


def checked_parameters(params: Tensor | Iterable[Tensor]) -> tuple[Tensor, ...]:
    """The tensors to differentiate, or ScorefnError where one of them cannot be."""
    parameters = as_parameters(params)
    for number, q in enumerate(parameters):
        if not isinstance(q, Tensor) or not q.requires_grad:
            kind = "does not require grad" if isinstance(q, Tensor) else f"is a {type(q).__name__}"
            raise ScorefnError(
                f"params[{number}] {kind}, so that no gradient in it is estimated: give the tensors that p was built "
                "from, such as policy.parameters(), with requires_grad=True."
            )
    return parameters


def check_arguments(
    p: Any,
    f: Any,
    coupling: Any,
    baseline: Any,
    control_variate: Any,
    draws: Any,
    behaviour: Any,
    program: Any,
    claimed: Any,
    false_alarm: Any,
) -> None:
    """Refuse what cannot play its part."""
    if in_transform():
        raise ScorefnError("audit reads values, which a torch.func transform or torch.compile hides: call it outside.")
    if isinstance(p, type) or not (hasattr(p, "draws") or (hasattr(p, "sample") and hasattr(p, "log_prob"))):
        raise ScorefnError(f"p={p!r} is not a measure: it needs sample and log_prob, as torch.distributions have them.")
    if behaviour is not None and (isinstance(behaviour, type) or not hasattr(behaviour, "log_prob")):
        raise ScorefnError(
            f"behaviour={behaviour!r} is not a measure: it needs log_prob, and sample where no draws are."
        )
    callables = (("f", f), ("baseline", baseline), ("control_variate", control_variate), ("program", program))
    for name, part in callables:
        if (part is None and name != "f") or (name == "baseline" and part == "auto"):
            continue
        if not callable(part) or isinstance(part, type):
            raise ScorefnError(f"{name}={part!r} cannot be called: give an object made from a class, or a function.")
    if coupling is not None and (isinstance(coupling, type) or not hasattr(coupling, "sample")):
        raise ScorefnError(f"coupling={coupling!r} is no coupling: use Antithetic(), Sobol() or another one, or None.")
    if draws is not None and not isinstance(draws, Draws):
        raise ScorefnError(f"draws must be a scorefn.Draws, but it is a {type(draws).__name__}.")
    if (program is None) != (claimed is None):
        raise ScorefnError("program and claimed belong together: a structure [K, J] is tested by running its program.")
    if claimed is not None and (not isinstance(claimed, Tensor) or claimed.dtype != torch.bool):
        raise ScorefnError(f"claimed must be a bool tensor [K, J], as for Influence, but it is {claimed!r}.")
    if isinstance(false_alarm, bool) or not isinstance(false_alarm, float) or not 0 < false_alarm < 1:
        raise ScorefnError(f"false_alarm is a probability between 0 and 1, but it is {false_alarm!r}: use 1e-6.")
