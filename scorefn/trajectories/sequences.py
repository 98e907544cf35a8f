"""Sequences of any autoregressive model as draws, one decision a token; and a KL divergence with the right gradient."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from scorefn.core import Baseline, Credit, Draws, NonFiniteError, ScorefnError, ShapeError, Total, surrogate
from scorefn.core.representation import representation
from scorefn.reducers import RewardToGo


class Sequences(NamedTuple):
    """What ``sequence_draws`` was told of N sequences: the x of its draws.

    Args:
        reward: ``[N]`` or ``[N, T]``, as it was given.
        ref_log_prob: ``[N, T]`` under the reference model, 0 where masked, or None.

    Example:
        >>> import torch
        >>> from scorefn.trajectories import sequence_draws
        >>> logp = torch.full((2, 3), -1.0, requires_grad=True)
        >>> ref_logp = torch.full((2, 3), -2.0)
        >>> draws = sequence_draws(logp, [1.0, 0.0], ref_logp=ref_logp, kl_weight=0.1)
        >>> draws.x.reward.tolist(), draws.x.ref_log_prob.shape
        ([1.0, 0.0], torch.Size([2, 3]))
    """

    reward: Tensor
    ref_log_prob: Tensor | None

    def __repr__(self) -> str:
        return representation(self)


def sequence_draws(
    logp: Tensor,
    reward: Any,
    *,
    mask: Tensor | None = None,
    group: Tensor | None = None,
    behaviour_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    kl_weight: float | None = None,
) -> Draws:
    """N sequences of up to T tokens as draws: each token is a decision (Ranzato et al., 2016).

    A reward of the whole sequence is charged to all its tokens (``Total``), a reward of each token to the tokens up to
    it (``RewardToGo``). With ``ref_logp`` the objective is ``E[reward] - kl_weight KL(pi || ref)``: each token's reward
    is diminished by ``kl_weight (log pi - log ref)``, detached, and charged as reward-to-go. The gradient of that is
    exact, on-policy and off-policy, because ``E[grad log pi] = 0``. The same term put into a loss undetached, with no
    score factor, has the gradient 0 in expectation ("k1 in the loss"); ``ref/pi - 1 - log(ref/pi)`` ("k3") has that of
    each token's ``KL(ref || pi)``, the other direction; half the square of each token's log-ratio ("k2") leaves out
    what a token does to the KL of later ones. ``kl_surrogate`` is the term that may be put in a loss. Sources: Schulman
    (2020), "Approximating KL divergence", for the values; Tang & Munos (2025), "On a few pitfalls in KL divergence
    gradient estimation for RL", for the gradients.

    Half-precision log-probabilities are served as they are; ``logp.float()`` first is more accurate.

    Args:
        logp: ``[N, T]``, the log-probability of each token under the model; requires grad when grad mode is on.
        reward: ``[N]``, or ``[N, T]`` with one value a token; numbers, or a tensor of the dtype of logp (bool and
            integers are converted).
        mask: ``[N, T]`` bool, True where the model chose a token that counts: response, not tool output, not padding.
            Holes are fine. What stands elsewhere, rewards included, is ignored, NaN or not. None: all count.
        group: ``[N]`` integers, the same for sequences of the same prompt, in any order and number; None: one prompt.
        behaviour_logp: ``[N, T]`` under the model (and the sampling temperature, top-k, ...) that made the sequences;
            None: the present model.
        ref_logp: ``[N, T]`` under the reference model; kept in ``draws.x`` for ``kl_surrogate``.
        kl_weight: of the KL in the reward, needed with ref_logp; 0 where the KL stands in the loss.

    Raises:
        ShapeError: a tensor of another shape; ``[N]`` and ``[N, 1]`` never meet by broadcasting.
        ScorefnError: a sequence that is masked throughout, a mask that is not bool, mixed dtypes, a kl_weight without
            ref_logp or the reverse, or one below 0.
        NonFiniteError: a value that counts is NaN or infinite.

    Example:
        >>> import torch, scorefn as sf
        >>> from scorefn.trajectories import sequence_draws
        >>> logp = torch.full((4, 2), -1.0, requires_grad=True)  # of the sampled tokens
        >>> mask = torch.tensor([[1, 1], [1, 0], [1, 1], [1, 1]]).bool()
        >>> draws = sequence_draws(logp, [1, 0, 1, 1], mask=mask, group=torch.tensor([0, 0, 1, 1]))
        >>> sf.surrogate(draws, baseline=sf.LeaveOneOut()).sum().backward()
        >>> logp.grad.tolist()  # each answer against the other one of its prompt
        [[1.0, 1.0], [-1.0, 0.0], [0.0, 0.0], [0.0, 0.0]]
    """
    _check_log_prob(logp)
    reward = _reward(reward, logp)
    _check_tensors(mask=mask, group=group, behaviour_logp=behaviour_logp, ref_logp=ref_logp)
    counts = _checked_mask(mask, logp)
    if (ref_logp is None) != (kl_weight is None):
        given, missing = ("kl_weight", "ref_logp") if ref_logp is None else ("ref_logp", "kl_weight")
        raise ScorefnError(
            f"{given} was given without {missing}: the KL in the reward needs both. With the KL in the loss "
            "(kl_surrogate), pass kl_weight=0.0."
        )
    credit: Credit = Total() if reward.ndim == 1 else RewardToGo()
    fx = reward.unsqueeze(-1) if reward.ndim == 1 else torch.where(counts, reward, 0.0)
    if ref_logp is not None and kl_weight is not None:
        if not hasattr(kl_weight, "__float__") or not 0.0 <= kl_weight < float("inf"):
            raise ScorefnError(f"kl_weight must be a number of at least 0, but it is {kl_weight!r}.")
        ref_logp = _checked_ref(ref_logp, logp, counts)
        if kl_weight > 0.0:
            penalty = kl_weight * (torch.where(counts, logp.detach(), 0.0) - ref_logp)
            fx = (fx if reward.ndim == 2 else _on_last_token(reward, counts)) - penalty
            credit = RewardToGo()
    x = Sequences(reward.detach(), ref_logp)
    return Draws(x, logp, fx, credit=credit, behaviour_log_prob=behaviour_logp, mask=mask, group=group)


def kl_surrogate(
    logp: Tensor | Draws,
    ref_logp: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    group: Tensor | None = None,
    behaviour_logp: Tensor | None = None,
    estimator: Literal["k1", "k3"] = "k3",
    baseline: Baseline | None = None,
) -> Tensor:
    """``KL(pi || ref)`` of whole sequences, ``[N]``: value *and* gradient are unbiased, so that it may stand in a loss.

    With ``l_t = log pi_t - log ref_t``, the value is ``sum_t w_t k(l_t)``, ``k1(l) = l`` or ``k3(l) = exp(-l) - 1 + l``
    (never negative, and of lower variance near the reference), w_t the importance weight of the tokens up to t. The
    gradient is that of the surrogate with these values, charged as reward-to-go, their own dependence on pi included::

        sum_t w_t (k(l_t) grad sum_{s <= t} log pi_s + grad k(l_t))

    where for k1 the last term, of mean 0, is left out. Subtract it from an objective, ``objective.value - beta *
    kl_surrogate(draws).mean()``. Both estimators of the value: Schulman (2020), "Approximating KL divergence".

    Args:
        logp: draws of ``sequence_draws``, or log-probabilities ``[N, T]`` beside which the next four stand.
        ref_logp: ``[N, T]``; None: that of the draws.
        mask: as for ``sequence_draws``.
        group: as for ``sequence_draws``; only a baseline asks for it.
        behaviour_logp: as for ``sequence_draws``.
        estimator: "k1" or "k3".
        baseline: subtracted from the KL to go, such as ``LeaveOneOut()``; None: none.

    Raises:
        ShapeError: a tensor of another shape.
        ScorefnError: no ref_logp, another estimator, fields given twice, or as ``sequence_draws``.
        NonFiniteError: a value that counts is NaN or infinite.

    Example:
        >>> import torch
        >>> from scorefn.trajectories import kl_surrogate
        >>> theta = torch.tensor([0.3, -0.2], requires_grad=True)
        >>> logp = theta.log_softmax(0).unsqueeze(1)  # all sequences of one token, [2, 1]
        >>> ref = torch.tensor([[0.5], [0.5]]).log()
        >>> mean = (logp[:, 0].detach().exp() * kl_surrogate(logp, ref)).sum()  # exact, then
        >>> exact = (logp.exp() * (logp - ref)).sum()
        >>> found = torch.autograd.grad(mean, theta, retain_graph=True)[0]
        >>> torch.allclose(found, torch.autograd.grad(exact, theta)[0])
        True
    """
    if isinstance(logp, Draws):
        if any(given is not None for given in (mask, group, behaviour_logp)):
            raise ScorefnError(
                "kl_surrogate was given draws, which have their own mask, group and behaviour_log_prob: leave these "
                "arguments out, or pass tensors only."
            )
        draws = logp
        logp, mask, group, behaviour_logp = draws.log_prob, draws.mask, draws.group, draws.behaviour_log_prob
        if ref_logp is None and isinstance(draws.x, Sequences):
            ref_logp = draws.x.ref_log_prob
    if ref_logp is None:
        raise ScorefnError(
            "kl_surrogate needs ref_logp, the log-probabilities under the reference: pass them here, or to "
            "sequence_draws(..., ref_logp=ref_logp, kl_weight=0.0)."
        )
    if estimator not in ("k1", "k3"):
        raise ScorefnError(
            f"estimator must be 'k1' or 'k3', but it is {estimator!r}: these have the value of KL(pi || ref) in "
            "expectation; half the squared log-ratio ('k2') has not."
        )
    _check_log_prob(logp)
    _check_tensors(ref_logp=ref_logp, mask=mask, group=group, behaviour_logp=behaviour_logp)
    counts = _checked_mask(mask, logp)
    log_ratio = torch.where(counts, logp, 0.0) - _checked_ref(ref_logp, logp, counts)
    value = log_ratio.detach() if estimator == "k1" else torch.expm1(-log_ratio) + log_ratio
    kl = Draws(
        None, logp, value, credit=RewardToGo(), behaviour_log_prob=behaviour_logp, mask=mask, group=group
    )  # fmt: skip
    return surrogate(kl, baseline=baseline)


def _check_log_prob(logp: Tensor) -> None:
    """Refuse log-probabilities that are not one number per token."""
    if not isinstance(logp, Tensor) or logp.ndim != 2 or 0 in logp.shape:
        found = f"shape {tuple(logp.shape)}" if isinstance(logp, Tensor) else f"a {type(logp).__name__}"
        raise ShapeError(
            f"logp must be a tensor [N, T], one log-probability per sequence and token, but it is {found}: gather "
            "those of the sampled tokens from the log-softmax, [N, T, vocabulary] -> [N, T]."
        )
    if not logp.dtype.is_floating_point:
        raise ScorefnError(f"logp must hold floating-point log-probabilities, but it is {logp.dtype}.")


def _check_tensors(**given: Any) -> None:
    """Refuse lists and arrays beside logp: only rewards, which come from outside, are converted."""
    for name, value in given.items():
        if value is not None and not isinstance(value, Tensor):
            raise ShapeError(
                f"{name} is a {type(value).__name__}, but it must be a tensor beside logp, whose dtype and device are "
                f"known: use torch.as_tensor({name}, device=logp.device)."
            )


def _reward(reward: Any, logp: Tensor) -> Tensor:
    """The reward as a tensor ``[N]`` or ``[N, T]`` of the dtype of logp."""
    if not isinstance(reward, Tensor):
        try:
            reward = torch.as_tensor(reward, dtype=logp.dtype, device=logp.device)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ScorefnError(
                f"reward is {repr(reward)[:80]}, but it must be numbers, one per sequence, ({len(logp)},), or one per "
                f"token, {tuple(logp.shape)}: no tensor can be made of it."
            ) from error
    elif not (reward.dtype.is_floating_point or reward.dtype.is_complex):
        reward = reward.to(logp.dtype)
    if reward.shape not in (logp.shape, logp.shape[:1]):
        raise ShapeError(
            f"reward has shape {tuple(reward.shape)}, but beside logp [N, T] = {tuple(logp.shape)} it must be "
            f"{tuple(logp.shape[:1])}, one value per sequence, or {tuple(logp.shape)}, one per token. "
            + ("Use reward.squeeze(-1)." if reward.shape == (*logp.shape[:1], 1) else "It is never broadcast.")
        )
    return _beside("reward", reward, logp)


def _checked_mask(mask: Tensor | None, logp: Tensor) -> Tensor:
    """Which tokens count, bool ``[N, T]``; a sequence without any is refused."""
    if mask is None:
        return torch.ones_like(logp, dtype=torch.bool)
    if mask.shape != logp.shape:
        raise ShapeError(
            f"mask has shape {tuple(mask.shape)}, but logp [N, T] = {tuple(logp.shape)}: one flag per sequence and "
            "token is needed. Where logp was shifted by one token, shift the mask alike."
        )
    if mask.dtype != torch.bool:
        raise ScorefnError(
            f"mask must be bool, but it is {mask.dtype}: tokens are not counted in parts. Use mask.bool()."
        )
    if not bool((some := mask.any(-1)).all()):
        empty = (~some).nonzero().flatten().tolist()
        raise ScorefnError(
            f"{len(empty)} of {len(mask)} sequences are masked throughout, namely {empty[:10]}"
            f"{' ...' if len(empty) > 10 else ''}: without a decision there is no score, and their reward would enter "
            "baselines and counts only. Leave them out of logp, reward, mask and group, or look at how mask is made."
        )
    return mask


def _checked_ref(ref_logp: Tensor, logp: Tensor, counts: Tensor) -> Tensor:
    """The reference's log-probabilities, 0 where masked."""
    if ref_logp.shape != logp.shape:
        raise ShapeError(f"ref_logp has shape {tuple(ref_logp.shape)}, but logp [N, T] = {tuple(logp.shape)}.")
    if ref_logp.requires_grad:
        raise ScorefnError(
            "ref_logp requires grad, but the reference is a constant of the objective. Score it under torch.no_grad(), "
            "or pass ref_logp.detach()."
        )
    ref_logp = torch.where(counts, _beside("ref_logp", ref_logp, logp), 0.0)
    if not bool((finite := ref_logp.isfinite()).all()):
        bad = (~finite).any(-1).nonzero().flatten().tolist()
        raise NonFiniteError(
            f"ref_logp is {ref_logp[~finite][0].item()} at {len(bad)} of {len(logp)} sequences, namely {bad[:10]}"
            f"{' ...' if len(bad) > 10 else ''}: KL(pi || ref) is infinite where the reference excludes what the model "
            "can produce. Use a reference with the same support, without top-k or top-p."
        )
    return ref_logp


def _beside(name: str, tensor: Tensor, logp: Tensor) -> Tensor:
    """The tensor, refused where it is of another dtype or device than logp."""
    if tensor.dtype != logp.dtype or tensor.device != logp.device:
        raise ScorefnError(
            f"{name} is {tensor.dtype} on {tensor.device}, but logp is {logp.dtype} on {logp.device}: scorefn neither "
            f"rounds nor copies silently. Convert one of them, for instance {name}.to(logp) or logp.float()."
        )
    return tensor


def _on_last_token(reward: Tensor, counts: Tensor) -> Tensor:
    """``[N] -> [N, T]``: the reward at the last token that counts, so that reward-to-go charges it to all."""
    later = counts.flip(-1).cumsum(-1).flip(-1)  # how many count from here on
    return torch.where(counts & (later == 1), reward.unsqueeze(-1), 0.0)
