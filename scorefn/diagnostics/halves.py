"""Two independent halves of a batch: how well their gradients agree, and what that says of signal and noise."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from scorefn.core import NonFiniteError, ScorefnError, ShapeError
from scorefn.core.representation import representation


class SplitHalves(NamedTuple):
    """How well the gradients of two independent halves of a batch agree.

    Attributes:
        cosine: of the angle between them; NaN where one of them is zero.
        signal_to_noise: of the whole batch: ``g_1 . g_2 / (n_1 n_2/N^2 |g_1 - g_2|^2)``, numerator and denominator
            each without bias, floored at 0. For equal halves of equal length it is ``2 cosine/(1 - cosine)``.

    Example:
        >>> import torch
        >>> from scorefn.diagnostics import split_halves
        >>> theta = torch.zeros(2, requires_grad=True)
        >>> surrogate = torch.tensor([[3.0, 4.0], [4.0, 3.0]]) @ theta  # two draws
        >>> cosine, signal_to_noise = split_halves(surrogate, theta)
        >>> round(cosine, 3), round(signal_to_noise, 3)
        (0.96, 48.0)
    """

    cosine: float
    signal_to_noise: float

    def __repr__(self) -> str:
        return representation(self)


def split_halves(
    surrogate: Tensor | tuple[Tensor, Tensor],
    params: Tensor | Iterable[Tensor],
    *,
    block: Tensor | None = None,
    gradient: Iterable[Tensor] | None = None,
) -> SplitHalves:
    """Cosine between the gradients of two halves of the draws, and the signal-to-noise ratio that follows from it.

    Blocks go to the halves by turns. Near 1, the batch is larger than it needs to be; near 0, an update is mostly
    noise. One number from one pair of halves is itself noisy: watch its average. Where a baseline ties the draws,
    see ``scorefn.trajectories.gradient_noise``. Two backward passes, one where the gradient of the mean is known; the
    graph is kept. Source: Ilyas et al. (2020), "A closer look at deep policy gradients", section 3.1.

    Args:
        surrogate: ``[N, *B]``, one value per draw, summed over B; or two such, of independent batches.
        params: the tensors to differentiate.
        block: ``[N]`` int, draws that depend on each other and are never separated; None: each its own.
        gradient: that of the mean over draws (of the sum over B), one tensor per parameter, where it is known: it saves
            a pass.

    Raises:
        ShapeError: a surrogate without draws, blocks or a gradient that do not fit.
        ScorefnError: fewer than two blocks, no parameters, a surrogate without a graph, or blocks or a gradient beside
            two surrogates.
        NonFiniteError: a gradient that is NaN or infinite.

    Example:
        >>> import torch, scorefn as sf
        >>> from scorefn.diagnostics import split_halves
        >>> _ = torch.manual_seed(0)
        >>> logits = torch.zeros(3, requires_grad=True)
        >>> draws = sf.draw(torch.distributions.Bernoulli(logits=logits), lambda x: x.sum(-1), 1000)
        >>> surrogate = sf.surrogate(draws, baseline=sf.LeaveOneOut())  # [N], before any mean
        >>> split_halves(surrogate, logits).cosine > 0.9  # the batch is larger than it needs to be
        True
    """
    found = moments(surrogate, params, block=block, gradient=gradient)
    cosine = found.agreement / found.norms if found.norms > 0 else float("nan")
    return SplitHalves(cosine, ratio_of(max(found.agreement, 0.0), found.variance / found.num_samples))


class Moments(NamedTuple):
    """What two halves say, each without bias and so never floored.

    Attributes:
        agreement: ``g_1 . g_2``, which estimates |E g|^2.
        variance: ``n_1 n_2/N |g_1 - g_2|^2``, which estimates the total variance of one draw: N times that of the mean.
        norms: ``|g_1| |g_2|``.
        num_samples: N.
    """

    agreement: float
    variance: float
    norms: float
    num_samples: int


def moments(
    surrogate: Tensor | tuple[Tensor, Tensor],
    params: Tensor | Iterable[Tensor],
    *,
    block: Tensor | None = None,
    gradient: Iterable[Tensor] | None = None,
) -> Moments:
    """As ``split_halves``, which see."""
    params = (params,) if isinstance(params, Tensor) else tuple(params)
    if isinstance(surrogate, Tensor):
        value, parameters = per_draw_values(surrogate, params)
        index, _ = independent_blocks(value, block)
        first = index % 2 == 0
        sizes = int(first.sum()), int((~first).sum())
        one = gradients(value, parameters, first.to(value) / sizes[0])
        if gradient is None:
            two = gradients(value, parameters, (~first).to(value) / sizes[1])
        else:
            known = _matching(gradient, parameters)
            two = tuple((len(value) * g - sizes[0] * h) / sizes[1] for g, h in zip(known, one, strict=True))
    else:
        if block is not None or gradient is not None:
            raise ScorefnError(
                "Two surrogates are two halves already: block and gradient belong to one surrogate of all draws. "
                "Leave them out."
            )
        halves = [per_draw_values(half, params) for half in surrogate]
        sizes = len(halves[0][0]), len(halves[1][0])
        one, two = (gradients(value / len(value), parameters) for value, parameters in halves)
    check_finite([*one, *two])
    N = sum(sizes)
    apart = [g - h for g, h in zip(one, two, strict=True)]
    norms = (dot(one, one) * dot(two, two)) ** 0.5
    return Moments(dot(one, two), sizes[0] * sizes[1] / N * dot(apart, apart), norms, N)


def per_draw_values(surrogate: Tensor, params: Tensor | Iterable[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """One value per draw ``[N]``, and the parameters."""
    parameters = (params,) if isinstance(params, Tensor) else tuple(params)
    if not parameters:
        raise ScorefnError("There are no parameters to differentiate: pass tensors that require grad.")
    if frozen := [i for i, q in enumerate(parameters) if not q.requires_grad]:
        raise ScorefnError(
            f"Parameters {frozen} do not require grad, so they have no gradient: leave them out of params."
        )
    if surrogate.ndim == 0:
        raise ShapeError(
            "The surrogate is a scalar, but one value per draw is needed, [N]: pass it before the mean is taken."
        )
    if not surrogate.requires_grad:
        raise ScorefnError(
            "The surrogate does not require grad, so it has no gradient: make it from parameters that require grad, "
            "outside torch.no_grad()."
        )
    return surrogate.reshape(len(surrogate), -1).sum(1), parameters


def independent_blocks(value: Tensor, block: Tensor | None) -> tuple[Tensor, Tensor]:
    """``block_labels``, of at least two blocks."""
    index, size = block_labels(value, block)
    if len(size) < 2:
        raise ScorefnError(
            f"There is {len(size)} independent block of draws ({len(value)} draws), but at least 2 are needed: one "
            "gradient says nothing about its own noise. Take more draws."
        )
    return index, size


def block_labels(value: Tensor, block: Tensor | None) -> tuple[Tensor, Tensor]:
    """The block of each draw ``[N]``, numbered from 0, and how many draws each has."""
    N = len(value)
    if block is None:
        return torch.arange(N, device=value.device), torch.ones(N, dtype=torch.long, device=value.device)
    if block.shape != (N,) or block.is_floating_point() or block.device != value.device:
        raise ShapeError(
            f"block is {block.dtype} of shape {tuple(block.shape)} on {block.device}, but for {N} draws on "
            f"{value.device} it must be integers of shape {(N,)} there: one label per draw."
        )
    index, size = torch.unique(block, return_inverse=True, return_counts=True)[1:]
    return index, size


def _matching(gradient: Iterable[Tensor], parameters: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    known = tuple(gradient)
    if [g.shape for g in known] != [q.shape for q in parameters]:
        raise ShapeError(
            f"gradient has shapes {[tuple(g.shape) for g in known]}, but params "
            f"{[tuple(q.shape) for q in parameters]}: give that of the surrogate's mean, one tensor per parameter."
        )
    return known


def check_finite(found: Iterable[Tensor]) -> None:
    """Refuse gradients that are NaN or infinite."""
    if not all(bool(g.isfinite().all()) for g in found):
        raise NonFiniteError(
            "The gradient of some draws is NaN or infinite, so it has neither mean nor variance. Make f and "
            "log_prob finite before they are measured."
        )


def dot(first: Iterable[Tensor], second: Iterable[Tensor]) -> float:
    """The inner product over all parameters, in double precision."""
    return float(sum((g.double() * h.double()).sum() for g, h in zip(first, second, strict=True)))


def ratio_of(signal: float, noise: float) -> float:
    """Their quotient; infinite without noise, NaN without either."""
    return signal / noise if noise > 0 else float("inf") if signal > 0 else float("nan")


def gradients(value: Tensor, params: tuple[Tensor, ...], weight: Tensor | None = None) -> tuple[Tensor, ...]:
    """Of ``sum_i weight_i value_i`` for each parameter, zeros where it has no part; the graph is kept.

    Raises:
        ScorefnError: an earlier backward pass has freed the graph.
    """
    weight = torch.ones_like(value) if weight is None else weight
    try:
        found = torch.autograd.grad(value, params, weight, retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        if "second time" not in str(error):
            raise
        raise ScorefnError(
            "The graph of the surrogate is gone: an earlier backward pass has freed it. Measure before that pass, or "
            "keep the graph with backward(retain_graph=True)."
        ) from error
    return tuple(torch.zeros_like(q) if g is None else g.detach() for q, g in zip(params, found, strict=True))
