"""Meters: how noisy a gradient is, what a baseline explains, how far a policy has moved."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.distributions import kl_divergence as _kl_divergence

from scorefn.core import Draws, NonFiniteError, ScorefnError, ShapeError
from scorefn.core.representation import representation
from scorefn.diagnostics.halves import (
    block_labels,
    check_finite,
    dot,
    independent_blocks,
    per_draw_values,
    ratio_of,
    split_halves,
)
from scorefn.trajectories.per_draw import residual_squares


@dataclass(frozen=True)
class GradientNoise:
    """Moments of the gradient of ``surrogate.mean()``, estimated from one batch.

    Attributes:
        mean: the gradient itself, per parameter, its shape.
        variance: of that mean, per parameter and coordinate.
        total_variance: the sum of the variances over all coordinates.
        signal_to_noise: ``|g|^2 / total_variance``, with |g|^2 estimated by ``|mean|^2 - total_variance``, floored at
            0; infinite without noise, NaN where there is no gradient either.
        noise_scale: ``N / signal_to_noise``: so many draws have as much noise as signal. McCandlish, Kaplan, Amodei et
            al. (2018), "An empirical model of large-batch training", eq. 2.9.
        num_blocks: how many independent blocks of draws there were.

    Example:
        >>> import torch
        >>> from scorefn.trajectories import gradient_noise
        >>> theta = torch.zeros(1, requires_grad=True)
        >>> # two draws, with gradients 1 and 3
        >>> found = gradient_noise(theta * torch.tensor([1.0, 3.0]), theta)
        >>> found.mean[0].item(), found.total_variance, found.signal_to_noise
        (2.0, 1.0, 3.0)
        >>> round(found.noise_scale, 3), found.num_blocks
        (0.667, 2)
    """

    mean: tuple[Tensor, ...]
    variance: tuple[Tensor, ...]
    total_variance: float
    signal_to_noise: float
    noise_scale: float
    num_blocks: int

    __repr__ = representation


def gradient_noise(
    surrogate: Tensor, params: Tensor | Iterable[Tensor], *, block: Tensor | None = None
) -> GradientNoise:
    """Mean, variance, signal-to-noise ratio and noise scale of a gradient, from the gradients of its single draws.

    With M independent blocks of n_m draws, S_m the gradient of a block's sum and g the mean over all N draws::

        Var g = M/(M - 1) sum_m (S_m - n_m g)^2 / N^2

    which is unbiased for blocks of one size (without blocks, the sample variance over N). A baseline that reads the
    other draws ties them: under ``LeaveOneOut()`` over all draws, with one decision each, ``Var g`` is understated by
    exactly ``(E g)^2/(N - 1)^2``. Where it reads the group, ``block=draws.group`` makes the groups the blocks, and
    what differs between groups is counted as noise.

    Costs as much as about ten backward passes where the parameters are those of linear layers, however many draws
    there are, and one pass for each block where they are not. The graph is kept: call it before the backward pass that
    frees it.

    Args:
        surrogate: ``[N, *B]``, one value per draw; summed over B.
        params: the tensors to differentiate.
        block: ``[N]`` int, draws that depend on each other (``draws.block``, ``draws.group``); None: each its own.

    Raises:
        ShapeError: a surrogate without draws, or blocks that do not fit it.
        ScorefnError: fewer than two blocks, no parameters, or a surrogate without a graph.
        NonFiniteError: a gradient that is NaN or infinite.

    Example:
        >>> import torch, scorefn as sf
        >>> from scorefn.trajectories import gradient_noise
        >>> _ = torch.manual_seed(0)
        >>> logits = torch.zeros(3, requires_grad=True)
        >>> draws = sf.draw(torch.distributions.Bernoulli(logits=logits), lambda x: x.sum(-1), 100)
        >>> plain, centred = sf.surrogate(draws), sf.surrogate(draws, baseline=sf.LeaveOneOut())
        >>> noisy, quiet = gradient_noise(plain, logits), gradient_noise(centred, logits)
        >>> quiet.signal_to_noise > noisy.signal_to_noise
        True
    """
    value, parameters = per_draw_values(surrogate, params)
    index, size = independent_blocks(value, block)
    mean, squares = residual_squares(value, parameters, index, size.to(value))
    check_finite(mean + squares)
    M, N = len(size), len(value)
    variance = tuple(square * (M / (M - 1) / N**2) for square in squares)
    total = float(sum(v.double().sum() for v in variance))
    signal = max(dot(mean, mean) - total, 0.0)
    ratio = ratio_of(signal, total)
    return GradientNoise(tuple(mean), variance, total, ratio, ratio_of(N * total, signal), M)


def explained_variance(signal: Tensor, baseline: Tensor, mask: Tensor | None = None) -> float:
    """R^2 of a baseline: ``1 - sum (signal - baseline)^2 / sum (signal - mean signal)^2`` over present decisions.

    1 is perfect, 0 what the best constant reaches, below 0 worse than that. A constant offset counts, as it does in
    the variance of the gradient; the "explained variance" of many programs forgives it. NaN for a constant signal.

    Args:
        signal: any shape, such as ``draws.signal()`` ``[N, *B, K]``.
        baseline: of the same shape, or ``[N, *B, 1]``.
        mask: bool, of the signal's shape, False where a decision is absent, such as ``draws.mask``.

    Raises:
        ShapeError: baseline or mask has another shape.
        ScorefnError: no decision is present.
        NonFiniteError: a value that is NaN or infinite.

    Example:
        >>> import torch
        >>> from scorefn.trajectories import explained_variance
        >>> signal = torch.tensor([[1.0], [2.0], [3.0]])
        >>> explained_variance(signal, signal), explained_variance(signal, torch.full((3, 1), 2.0))
        (1.0, 0.0)
        >>> explained_variance(signal, signal + 1)  # the offset counts
        -0.5
    """
    if baseline.shape not in (signal.shape, (*signal.shape[:-1], 1)):
        raise ShapeError(
            f"baseline has shape {tuple(baseline.shape)}, but beside a signal of shape {tuple(signal.shape)} it must "
            f"be {tuple(signal.shape)} or {(*signal.shape[:-1], 1)}: one number per decision, or per draw."
        )
    pairs = [_present("signal", signal, mask), _present("baseline", baseline.expand_as(signal), mask)]
    for name, values in zip(("signal", "baseline"), pairs, strict=True):
        _refuse_non_finite(name, values)
    values, explained = pairs
    if bool(values.min() == values.max()):  # what rounding leaves of no variance at all would be divided by
        return float("nan")
    return float(1 - (values - explained).square().sum() / (values - values.mean()).square().sum())


def mean_entropy(policy: Distribution, mask: Tensor | None = None) -> float:
    """Mean entropy ``-E log policy(a | s)`` of a policy's distributions over present steps, in nats.

    Args:
        policy: batch shape ``[*batch]``, such as ``[N, T]``.
        mask: ``[*batch]`` bool, False where a step is absent.

    Raises:
        ShapeError: mask has another shape.
        ScorefnError: the distribution has no closed-form entropy, or no step is present.
        NonFiniteError: an entropy that is NaN or infinite.

    Example:
        >>> import torch
        >>> from scorefn.trajectories import mean_entropy
        >>> # log 4
        >>> round(mean_entropy(torch.distributions.Categorical(logits=torch.zeros(5, 4))), 3)
        1.386
    """
    try:
        entropy = policy.entropy()
    except NotImplementedError as error:
        raise ScorefnError(
            f"{type(policy).__name__} has no entropy in closed form. Use the mean of -log_prob of its samples, which "
            "estimates it."
        ) from error
    return float(_refuse_non_finite("entropy", _present("entropy", entropy, mask)).mean())


def mean_kl_divergence(previous: Distribution, policy: Distribution, mask: Tensor | None = None) -> float:
    """``KL(previous || policy)`` averaged over present steps, exactly, in nats; arguments as torch orders them.

    ``E_previous[log previous(a | s) - log policy(a | s)]`` at the observations s of each step. Infinite where the
    policy excludes what the previous one could do.

    Args:
        previous: batch shape ``[*batch]``, such as ``[N, T]``: the policy that acted, at the observations it met.
        policy: of the same shapes: the policy now, at the same observations.
        mask: ``[*batch]`` bool, False where a step is absent.

    Raises:
        ShapeError: the distributions, or mask, differ in shape.
        ScorefnError: torch knows no closed form for the pair, or no step is present.
        NonFiniteError: a divergence that is NaN.

    Example:
        >>> import torch
        >>> from scorefn.trajectories import mean_kl_divergence
        >>> before = torch.distributions.Normal(torch.zeros(5), 1.0)  # at five observations
        >>> now = torch.distributions.Normal(torch.ones(5), 1.0)
        >>> mean_kl_divergence(before, now)
        0.5
    """
    shapes = [(tuple(p.batch_shape), tuple(p.event_shape)) for p in (previous, policy)]
    if shapes[0] != shapes[1]:
        raise ShapeError(
            f"previous has batch and event shapes {shapes[0]}, but policy {shapes[1]}: both must be at the same "
            "observations, and are never repaired by broadcasting."
        )
    try:
        divergence = _kl_divergence(previous, policy)
    except NotImplementedError as error:
        raise ScorefnError(
            f"KL({type(previous).__name__} || {type(policy).__name__}) has no closed form that torch knows. Use "
            "policy_change, which estimates it from the draws."
        ) from error
    values = _present("divergence", divergence, mask)
    if bool(values.isnan().any()):
        raise NonFiniteError("The divergence is NaN at some steps: look at the parameters of both policies there.")
    return float(values.mean())


class PolicyChange(NamedTuple):
    """An estimate of the KL divergence to the policy that acted.

    Attributes:
        kl: ``KL(previous || policy)``, per decision, in nats; never negative.
        standard_error: of it, from the differences between independent draws; NaN where there is only one.

    Example:
        >>> import torch
        >>> from scorefn.trajectories import policy_change, sequence_draws
        >>> logp = torch.tensor([[-1.0], [-2.0]], requires_grad=True)
        >>> change = policy_change(sequence_draws(logp, [1.0, 0.0]), logp)  # nothing has moved yet
        >>> change.kl, change.standard_error
        (0.0, 0.0)
    """

    kl: float
    standard_error: float

    def __repr__(self) -> str:
        return representation(self)


def policy_change(draws: Draws, log_prob: Tensor) -> PolicyChange:
    """How far the policy has moved since it made the draws, from log-probabilities alone.

    The mean over present decisions of ``r - 1 - log r``, with r the ratio of the new probability to that of the
    distribution that was sampled (``behaviour_log_prob``, or log_prob on-policy): it estimates ``KL(previous ||
    policy)`` without bias where the number of decisions is fixed. Source: Schulman (2020), "Approximating KL
    divergence", k3.

    Args:
        draws: as they were made.
        log_prob: ``[N, *B, K]``, of the same decisions under the policy now.

    Raises:
        ShapeError: log_prob has another shape than that of the draws.
        NonFiniteError: a new log-probability of a present decision is NaN or infinite.
        ScorefnError: draws are no ``Draws``, log_prob is no tensor, or no decision is present.

    Example:
        >>> import torch
        >>> from scorefn.trajectories import policy_change, sequence_draws
        >>> logp = torch.full((4, 2), 0.25).log().requires_grad_()
        >>> draws = sequence_draws(logp, [1.0, 0.0, 0.0, 1.0])
        >>> # r = 2: 2 - 1 - log 2, above a usual limit
        >>> round(policy_change(draws, torch.full((4, 2), 0.5).log()).kl, 3)
        0.307
    """
    if not isinstance(draws, Draws) or not isinstance(log_prob, Tensor):
        raise ScorefnError(
            f"policy_change(draws, log_prob) takes Draws and a tensor, but it was given a {type(draws).__name__} and a "
            f"{type(log_prob).__name__}: keep the draws that were made, and score their decisions with the present "
            "policy."
        )
    before = draws.log_prob if draws.behaviour_log_prob is None else draws.behaviour_log_prob
    if log_prob.shape != before.shape:
        raise ShapeError(
            f"log_prob has shape {tuple(log_prob.shape)}, but the draws have {tuple(before.shape)}: score the same "
            "decisions with the present policy."
        )
    present = torch.ones_like(before, dtype=torch.bool) if draws.mask is None else draws.mask
    _refuse_non_finite("log_prob", _present("log_prob", log_prob, present))
    log_ratio = torch.where(present, log_prob.detach().double() - before.detach().double(), 0.0)
    index, size = block_labels(before, draws.block)
    sums, counts = (
        torch.zeros(len(size), dtype=torch.float64, device=index.device).index_add(0, index, v.flatten(1).sum(1))
        for v in (log_ratio.expm1() - log_ratio, present.double())
    )
    kl, M = sums.sum() / counts.sum(), len(size)
    residual = (sums - kl * counts).square().sum()
    error = (M / (M - 1) * residual).sqrt() / counts.sum() if M > 1 else float("nan")
    return PolicyChange(float(kl), float(error))


def read_meters(
    surrogate: Tensor,
    params: Tensor | Iterable[Tensor],
    draws: Draws,
    *,
    baseline: Tensor | None = None,
    gradient: Iterable[Tensor] | None = None,
) -> dict[str, float]:
    """What to log beside the return, by name; the value of a surrogate means nothing.

    ``gradient cosine`` and ``gradient signal-to-noise`` (``split_halves``, by the draws' blocks), ``entropy``
    on-policy (mean of -log_prob over present decisions: an estimate), ``baseline R2`` where a baseline is given. One
    backward pass where the gradient of the mean is known, else two. Call it before the backward pass that frees the
    graph; for the KL divergence of the step, call ``policy_change`` after it.

    Args:
        surrogate: ``[N, *B]``, of these draws.
        params: the tensors to differentiate.
        draws: what the surrogate was made from.
        baseline: ``[N, *B, K]`` or ``[N, *B, 1]``, what was subtracted from ``draws.signal()``.
        gradient: see ``split_halves``.

    Raises:
        ShapeError: a surrogate of other draws; and what ``split_halves`` and ``explained_variance`` refuse.

    Example:
        >>> import torch, scorefn as sf
        >>> from scorefn.trajectories import read_meters
        >>> logits = torch.zeros(3, requires_grad=True)
        >>> draws = sf.draw(torch.distributions.Bernoulli(logits=logits), lambda x: x.sum(-1), 64)
        >>> value = sf.surrogate(draws, baseline=sf.LeaveOneOut())
        >>> baseline = sf.LeaveOneOut()(draws.signal(), draws)
        >>> found = read_meters(value, logits, draws, baseline=baseline)
        >>> sorted(found)
        ['baseline R2', 'entropy', 'gradient cosine', 'gradient signal-to-noise']
        >>> round(found["entropy"], 3)  # three fair bits: 3 log 2
        2.079
    """
    if surrogate.shape[:1] != (len(draws),):
        raise ShapeError(
            f"surrogate has shape {tuple(surrogate.shape)}, but there are {len(draws)} draws: it must be the "
            "surrogate of these draws, one value each, before any mean."
        )
    halves = split_halves(surrogate, params, block=draws.block, gradient=gradient)
    found = {"gradient cosine": halves.cosine, "gradient signal-to-noise": halves.signal_to_noise}
    if draws.behaviour_log_prob is None:
        found["entropy"] = -float(_present("log_prob", draws.log_prob, draws.mask).mean())
    if baseline is not None:
        found["baseline R2"] = explained_variance(draws.signal(), baseline, draws.mask)
    return found


def _present(name: str, values: Tensor, mask: Tensor | None) -> Tensor:
    """Values of present decisions, detached, in double precision."""
    values = values.detach().double()
    if mask is None:
        return values.flatten()
    if mask.shape != values.shape or mask.dtype != torch.bool:
        raise ShapeError(
            f"mask is {mask.dtype} of shape {tuple(mask.shape)}, but {name} has shape {tuple(values.shape)}: one bool "
            "per value is needed."
        )
    if not bool(mask.any()):
        raise ScorefnError(f"All of {name} is masked, so there is nothing to measure: look at how mask is made.")
    return values[mask]


def _refuse_non_finite(name: str, values: Tensor) -> Tensor:
    if not bool((finite := values.isfinite()).all()):
        raise NonFiniteError(
            f"{name} is {values[~finite][0].item()} in {int((~finite).sum())} of {len(values)} present decisions: such "
            "a mean says nothing. Look at where it comes from."
        )
    return values
