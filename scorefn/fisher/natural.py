"""The natural gradient: the inverse Fisher information times the gradient of the surrogate."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, overload

import torch
from torch import Tensor

from scorefn.core import (
    Baseline,
    Credit,
    Draws,
    Measure,
    ScorefnError,
    ShapeError,
    StructuredMeasure,
    joint_log_prob,
    surrogate,
)
from scorefn.fisher.information import check_damping, fisher_information
from scorefn.fisher.solvers import FisherSolver, Scores, automatic, sample_weight


@overload
def natural_gradient(
    p: Measure | StructuredMeasure,
    draws: Draws,
    *,
    params: None = None,
    credit: Credit | None = None,
    baseline: Baseline | None = None,
    damping: float = 0.0,
    solver: FisherSolver | None = None,
) -> dict[str, Tensor]: ...


@overload
def natural_gradient(
    p: Measure | StructuredMeasure,
    draws: Draws,
    *,
    params: Tensor | Iterable[Tensor],
    credit: Credit | None = None,
    baseline: Baseline | None = None,
    damping: float = 0.0,
    solver: FisherSolver | None = None,
) -> tuple[Tensor, ...]: ...


def natural_gradient(
    p: Measure | StructuredMeasure,
    draws: Draws,
    *,
    params: Tensor | Iterable[Tensor] | None = None,
    credit: Credit | None = None,
    baseline: Baseline | None = None,
    damping: float = 0.0,
    solver: FisherSolver | None = None,
) -> dict[str, Tensor] | tuple[Tensor, ...]:
    """``(F + damping I)^-1 g`` with g the gradient of ``surrogate(draws, ...)``: the steepest direction in p itself.

    g is the gradient of the mean over draws, summed over the problems B, so that each problem has the natural gradient
    it would have alone. It has f's own sign: subtract it to lower f. To first order a step changes p in the same way
    whatever the parameters are; and for an exponential family in its natural parameters it is the coefficient of f in
    a least-squares regression on the sufficient statistics.

    *In the parameters of p* (``params=None``): F is the closed form of ``fisher_information(p)``. The draws are scored
    anew, so that p may be rebuilt from the same values after they were drawn.

    *In any tensors from which the draws' log-probabilities were computed* (``params``; a network, a policy): F is
    estimated from the draws, ``F = S^T S`` with a row ``grad log p(x_n) / sqrt(N)`` for each draw, summed over its
    decisions; absent ones count for nothing, and off-policy draws enter with their importance weights. With fewer
    draws than parameters it is singular, and damping is needed.

    Sources: Amari (1998), "Natural gradient works efficiently in learning"; Ollivier, Arnold, Auger & Hansen (2017),
    "Information-geometric optimization algorithms", JMLR 18; Martens (2020), JMLR 21.

    Args:
        p: the measure the draws belong to; with ``params=None`` of a registered family.
        draws: from ``draw(p, f, num_samples)``, ``[N, *B, K]``; structured ones need ``params``.
        params: None, or tensors that require grad.
        credit: as for ``surrogate``.
        baseline: as for ``surrogate``: read, never updated; None: none.
        damping: added to the diagonal of F, at least 0; see ``FisherInformation.solve``.
        solver: for ``params``; None: with R = N B rows and P parameters, ``DenseSolve`` for P <= R and ``Woodbury`` for
            P > R where min(R, P) <= 128 and R P <= 2^26, otherwise ``ConjugateGradients``.

    Returns:
        A tensor for each parameter of p, by name; or one for each of ``params``, in their order.

    Raises:
        ScorefnError: F is singular (the message names damping); no closed form is known for p (it names
            ``register_fisher`` and the solvers); a tensor of ``params`` has no part in the log-probabilities; the draws
            do not belong to p; f itself requires grad, but ``params`` is None.
        ShapeError: the draws have another shape than p gives.

    Example:
        >>> import torch
        >>> from scorefn import natural_gradient
        >>> _ = torch.manual_seed(0)
        >>> p = torch.distributions.Normal(torch.tensor(3.0, requires_grad=True), 1.0)
        >>> from scorefn import LeaveOneOut, draw
        >>> draws = draw(p, lambda x: x.square(), 1000)
        >>> sorted(natural_gradient(p, draws, baseline=LeaveOneOut()))
        ['loc', 'scale']
    """
    check_damping(damping)
    with torch.enable_grad():
        if params is not None:
            return _in_params(p, draws, params, credit, baseline, damping, solver)
        if solver is not None:
            raise ScorefnError(
                f"solver={solver!r} estimates the Fisher information in given tensors, but params is None, where the "
                "closed form of p is used. Pass params=..., or leave solver out."
            )
        return _in_own_parameters(p, draws, credit, baseline, damping)


def _in_own_parameters(
    p: Any, draws: Draws, credit: Credit | None, baseline: Baseline | None, damping: float
) -> dict[str, Tensor]:
    fisher = fisher_information(p)
    if draws.fx.requires_grad:
        raise ScorefnError(
            "f requires grad: its pathwise part is a gradient in whatever f was computed from, not in the parameters "
            "of p. Pass params=..., or detach what f returns."
        )
    leaves = {name: value.clone().requires_grad_() for name, value in fisher.parameters.items()}
    try:
        rebuilt = fisher.rebuild(**leaves)
    except TypeError as error:
        raise ScorefnError(
            f"{type(p).__name__} cannot be made from the parameters {list(leaves)} of the family whose closed form it "
            f"inherits ({error}). Register its own with scorefn.register_fisher."
        ) from error
    log_prob = _rescored(rebuilt, draws)
    objective = surrogate(replace(draws, log_prob=log_prob), credit=credit, baseline=baseline).mean(0).sum()
    gradient = torch.autograd.grad(objective, list(leaves.values()))
    return fisher.solve(dict(zip(leaves, gradient, strict=True)), damping)


def _in_params(
    p: Any,
    draws: Draws,
    params: Tensor | Iterable[Tensor],
    credit: Credit | None,
    baseline: Baseline | None,
    damping: float,
    solver: FisherSolver | None,
) -> tuple[Tensor, ...]:
    tensors = (params,) if isinstance(params, Tensor) else tuple(params)
    _check_params(tensors, draws)
    if not callable(getattr(p, "draws", None)):
        with torch.no_grad():
            _rescored(p, draws)
    objective = surrogate(draws, credit=credit, baseline=baseline).mean(0).sum()
    parts = torch.autograd.grad(objective, tensors, retain_graph=True, materialize_grads=True)
    gradient = torch.cat([part.reshape(-1) for part in parts])
    weight = sample_weight(draws.log_prob, draws.behaviour_log_prob) / len(draws)
    scores = Scores(draws.log_prob.sum(-1).flatten(), tensors, weight.flatten())
    chosen = automatic(scores.shape) if solver is None else solver
    if not callable(chosen):
        raise ScorefnError(
            f"solver={solver!r} is no solver: use DenseSolve(), Woodbury(), ConjugateGradients(), or None to have one "
            "of them chosen by size."
        )
    solution = chosen(scores, gradient, damping).split([tensor.numel() for tensor in tensors])
    return tuple(part.reshape(tensor.shape).detach() for part, tensor in zip(solution, tensors, strict=True))


def _check_params(params: tuple[Tensor, ...], draws: Draws) -> None:
    """Refuse tensors that the log-probabilities do not depend on."""
    repair = (
        "Build p from the tensors in params, by differentiable operations, before the draws are made, and pass only "
        "those that it depends on."
    )
    if not params or not all(isinstance(tensor, Tensor) and tensor.requires_grad for tensor in params):
        raise ScorefnError(
            f"params must be tensors that require grad, at least one, but something else is among them. {repair}"
        )
    if not draws.log_prob.requires_grad:
        raise ScorefnError(f"The log-probabilities of the draws do not require grad, so they have no scores. {repair}")
    found = torch.autograd.grad(draws.log_prob.sum(), params, retain_graph=True, allow_unused=True)
    for position, (tensor, gradient) in enumerate(zip(params, found, strict=True)):
        if gradient is None:
            raise ScorefnError(
                f"params[{position}], of shape {tuple(tensor.shape)}, is not in the graph of the draws' "
                f"log-probabilities, so its score is unknown. {repair}"
            )


def _rescored(p: Any, draws: Draws) -> Tensor:
    """The log-probabilities of the draws under p, ``[N, *B, 1]``, refused where they are not the draws' own."""
    origin = "Pass the measure from which these draws were made, with the parameters it had then."
    try:
        log_prob = p.log_prob(draws.x)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ScorefnError(f"{type(p).__name__} cannot score these draws ({error}). {origin}") from error
    lead = draws.log_prob.shape[:-1]
    batch = getattr(p, "batch_shape", log_prob.shape[1:])
    if draws.log_prob.shape[-1] != 1 or log_prob.shape[: len(lead)] != lead or log_prob.shape[1:] != batch:
        raise ShapeError(
            f"The draws have log-probabilities [N, *B, K] = {tuple(draws.log_prob.shape)}, but {type(p).__name__} "
            f"gives them the shape {tuple(log_prob.shape)} and has batch shape {tuple(batch)}: they do not belong to "
            f"it. {origin}"
        )
    joint = joint_log_prob(log_prob, draws.log_prob[..., 0])
    gap = (joint - draws.log_prob).detach().abs()
    tolerance = 10 * torch.finfo(gap.dtype).eps ** 0.5
    if not bool((gap <= tolerance * (1 + draws.log_prob.detach().abs())).all()):
        raise ScorefnError(
            f"{type(p).__name__} gives the draws other log-probabilities than they have, by up to "
            f"{float(gap.max()):.2g}: they do not belong to it. {origin}"
        )
    return joint
