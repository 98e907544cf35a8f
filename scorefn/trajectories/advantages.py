"""Advantages with a value function: temporal differences, generalised advantage estimation and V-trace."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from scorefn.core import NonFiniteError, ScorefnError, ShapeError
from scorefn.core.representation import representation
from scorefn.reducers import ValueFunction, linear_recurrence
from scorefn.reducers.baselines import _evaluating
from scorefn.reducers.credit import check_fraction
from scorefn.trajectories.record import Trajectories


class TemporalDifference:
    """The f of an actor with a critic: the temporal-difference error of each step, ``Trajectories -> [N, T]``.

    ::

        delta_t = r_t + discount V(s_{t+1}) - V(s_t),    V(s_{t+1}) = 0 where the step terminated

    A truncated episode, and one that goes on beyond its segment, keep what V expects of the rest. Charged by
    ``RewardToGo(discount * lambda_, visitation_discount=False)`` it is generalised advantage estimation; by
    ``RewardToGo(discount)``, with whole terminated episodes, it is the exact gradient of the discounted return, with V
    as a baseline. Nothing is differentiated, and V is read in evaluation mode: fit it *after* the advantages are taken.
    V(s_{t+1}) is evaluated only where the next column does not hold it: after truncated and last steps. Source: Sutton
    (1988), "Learning to predict by the methods of temporal differences".

    Args:
        value: maps observations ``[*batch, *obs]`` to ``[*batch]`` or ``[*batch, 1]``; or a ``ValueFunction``, of which
            the module is used.
        discount: in [0, 1].

    Raises:
        ScorefnError: a discount outside [0, 1].
        ShapeError: the values are of another shape.
        NonFiniteError: the value of a present step is NaN or infinite, with the stream and step named.

    Example:
        >>> import gymnasium, torch
        >>> from torch import nn
        >>> from scorefn.trajectories import CategoricalPolicy, TemporalDifference, rollout
        >>> policy = CategoricalPolicy(nn.Linear(4, 2))
        >>> seen = rollout(gymnasium.make("CartPole-v1"), policy, 2, max_steps=5)
        >>> # the value function may be any module
        >>> f = TemporalDifference(nn.Linear(4, 1), discount=0.9)
        >>> values, next_values = f.values(seen)
        >>> torch.allclose(f(seen), seen.rewards + 0.9 * next_values - values)
        True
        >>> f(seen).shape  # [N, T]: one value per step, for TrajectoryDistribution to charge
        torch.Size([2, 5])
    """

    def __init__(self, value: Callable[[Any], Tensor], discount: float) -> None:
        check_fraction("discount", discount)
        self.value: Callable[[Any], Tensor] = value.module if isinstance(value, ValueFunction) else value
        self.discount = discount

    def __repr__(self) -> str:
        """As it was called."""
        return f"TemporalDifference({self.value!r}, {self.discount})"

    def __call__(self, trajectories: Trajectories) -> Tensor:
        """``[N, T]``, 0 where there is no step."""
        values, next_values = self.values(trajectories)
        return _differences(trajectories.rewards, values, next_values, trajectories.terminated, self.discount).where(
            trajectories.mask, 0.0
        )

    @torch.no_grad()
    def values(self, trajectories: Trajectories) -> tuple[Tensor, Tensor]:
        """``V(s_t)`` and ``V(s_{t+1})``, each ``[N, T]`` and 0 where absent; the second is 0 where the step terminated.

        With ``gae`` they give ``advantages``, and ``advantages + values`` is what V is fitted to afterwards.
        """
        mask, terminated = trajectories.mask, trajectories.terminated
        present = mask.nonzero(as_tuple=True)
        known = torch.zeros_like(mask)  # where the next column belongs to the same episode
        known[:, :-1] = mask[:, :-1] & mask[:, 1:] & ~trajectories.done[:, :-1]
        unknown = (mask & ~terminated & ~known).nonzero(as_tuple=True)
        values = self._evaluated(trajectories.observations, present, trajectories.rewards)
        moved = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], 1).where(known, 0.0)
        return values, moved + self._evaluated(trajectories.next_observations, unknown, trajectories.rewards)

    def _evaluated(self, observations: Any, at: tuple[Tensor, ...], like: Tensor) -> Tensor:
        """The values of some places, in one call, and 0 elsewhere."""
        count, found = len(at[0]), like.new_zeros(like.shape)
        if count == 0:
            return found
        chosen = pytree.tree_map(lambda leaf: leaf[at], observations)
        if isinstance(self.value, nn.Module):
            with _evaluating(self.value):
                value = self.value(chosen)
        else:
            value = self.value(chosen)
        if not isinstance(value, Tensor) or value.shape not in ((count,), (count, 1)):
            kind = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise ShapeError(
                f"The value function returned {kind} for {count} observations: it must map observations "
                f"[*batch, *obs] to [*batch] or [*batch, 1], here {(count,)} or {(count, 1)}."
            )
        value = value.detach().reshape(count)
        if not bool((finite := value.isfinite()).all()):
            i = int((~finite).nonzero()[0])
            raise NonFiniteError(
                f"The value function returned {value[i].item()} for step {int(at[1][i])} of stream {int(at[0][i])}: it "
                "would make every advantage before it NaN. Look at the observations and at what it was fitted to."
            )
        return found.index_put(at, value.to(like))


@torch.no_grad()
def gae(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    done: Tensor,
    *,
    discount: float,
    lambda_: float,
    mask: Tensor | None = None,
) -> Tensor:
    """Generalised advantage estimation, ``[N, T]``, detached.

    ::

        A_t = delta_t + discount lambda_ A_{t+1} within the episode
        delta_t = r_t + discount V(s_{t+1}) - V(s_t),    V(s_{t+1}) = 0 where the step terminated

    ``done`` cuts the sum, and only ``terminated`` kills the bootstrap. It equals ``RewardToGo(discount * lambda_,
    visitation_discount=False, done)`` on temporal differences. With ``lambda_ = 1`` it is the discounted reward-to-go
    (bootstrapped at truncations) minus V; with ``lambda_ = 0`` the temporal difference itself.

    Its bias: with V the value function of the policy it has none for any ``lambda_``; with another V none only for
    ``lambda_ = 1`` and no bootstrap. Either way it leaves ``discount^t`` out, so that the gradient it gives is not that
    of the discounted return (see ``RewardToGo``). Source: Schulman, Moritz, Levine, Jordan & Abbeel (2016),
    "High-dimensional continuous control using generalized advantage estimation", eq. 16.

    Args:
        rewards: ``[N, T]``.
        values: ``[N, T]``, ``V(s_t)``.
        next_values: ``[N, T]``, ``V`` of what each step led to before any reset; not read where the step terminated.
        terminated: ``[N, T]`` bool.
        done: ``[N, T]`` bool, terminated or truncated.
        discount: in [0, 1].
        lambda_: in [0, 1].
        mask: ``[N, T]`` bool, False where there is no step: nothing is read there, and the advantage is 0.

    Raises:
        ScorefnError: discount or ``lambda_`` outside [0, 1], flags that are not bool, or a step that terminated without
            being done.
        ShapeError: the tensors are not of one shape.
        NonFiniteError: a reward or a value that counts is NaN or infinite, with stream and step named.

    Example:
        >>> import torch
        >>> from scorefn.trajectories import gae
        >>> rewards = torch.tensor([[1.0, 1.0, 1.0]])
        >>> values, next_values = torch.tensor([[2.0, 2.0, 2.0]]), torch.tensor([[2.0, 2.0, 7.0]])
        >>> last, never = torch.tensor([[False, False, True]]), torch.zeros(1, 3, dtype=torch.bool)
        >>> # returns 3, 2, 1, less V
        >>> gae(rewards, values, next_values, last, last, discount=1.0, lambda_=1.0)
        tensor([[ 1.,  0., -1.]])
        >>> # truncated: V = 7 goes on
        >>> gae(rewards, values, next_values, never, last, discount=1.0, lambda_=1.0)
        tensor([[8., 7., 6.]])
        >>> gae(rewards, values, next_values, never, last, discount=1.0, lambda_=0.0)
        tensor([[1., 1., 6.]])
    """
    check_fraction("discount", discount)
    check_fraction("lambda_", lambda_)
    _check_shapes(rewards, values=values, next_values=next_values, terminated=terminated, done=done, mask=mask)
    delta = _differences(rewards, values, next_values, terminated, discount)
    if mask is not None:
        delta = delta.where(mask, 0.0)
    _check_finite(delta, mask, terminated, rewards=rewards, values=values, next_values=next_values)
    advantage = linear_recurrence(delta, discount * lambda_ * _goes_on(done, mask).to(delta), reverse=True, dim=-1)
    return advantage if mask is None else advantage.where(mask, 0.0)


class VTrace(NamedTuple):
    """What V-trace finds, each ``[N, T]`` and 0 where there is no step.

    Args:
        targets: what V is fitted to.
        advantages: what ``grad log policy(a_t | s_t)`` is multiplied with.

    Example:
        >>> import torch
        >>> from scorefn.trajectories import vtrace
        >>> rewards, values = torch.ones(1, 3), torch.full((1, 3), 2.0)
        >>> last = torch.tensor([[False, False, True]])
        >>> found = vtrace(rewards, values, values, last, last, torch.zeros(1, 3), discount=1.0)
        >>> found.targets  # on-policy: the returns
        tensor([[3., 2., 1.]])
        >>> found.advantages
        tensor([[ 1.,  0., -1.]])
    """

    targets: Tensor
    advantages: Tensor

    def __repr__(self) -> str:
        return representation(self)


@torch.no_grad()
def vtrace(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    done: Tensor,
    log_ratio: Tensor,
    *,
    discount: float,
    rho_bar: float = 1.0,
    c_bar: float = 1.0,
    lambda_: float = 1.0,
    mask: Tensor | None = None,
) -> VTrace:
    """V-trace targets and advantages from steps of another policy, detached.

    ::

        v_t = V(s_t) + delta_t + discount c_t (v_{t+1} - V(s_{t+1}))
        delta_t = rho_t (r_t + discount V(s_{t+1}) - V(s_t))
        rho_t = min(rho_bar, policy / behaviour),    c_t = lambda_ min(c_bar, policy / behaviour)
        advantage_t = rho_t (r_t + discount v_{t+1} - V(s_t))

    At the end of an episode or of the segment ``v_{t+1}`` is ``V(s_{t+1})``, or 0 where the step terminated. With
    ratios of 1 the targets are the n-step returns of the policy.

    Its bias: V is fitted to the value of the policy proportional to ``min(rho_bar behaviour, policy)``, which lies
    between the two, and is the policy itself for ``rho_bar = inf``; ``c_bar`` moves variance and speed, not the fixed
    point. The advantages do not correct for the states that the behaviour visits. Source: Espeholt et al. (2018),
    "IMPALA", eq. 1 and section 4.2.

    Args:
        rewards: ``[N, T]``.
        values: ``[N, T]``, ``V(s_t)``.
        next_values: ``[N, T]``, ``V`` of what each step led to before any reset; not read where the step terminated.
        terminated: ``[N, T]`` bool.
        done: ``[N, T]`` bool, terminated or truncated.
        log_ratio: ``[N, T]``, log-probability of each action under the policy minus that under the behaviour.
        discount: in [0, 1].
        rho_bar: above 0; ``math.inf`` for no truncation.
        c_bar: above 0; ``math.inf`` for no truncation.
        lambda_: in [0, 1].
        mask: ``[N, T]`` bool, False where there is no step: nothing is read there.

    Raises:
        ScorefnError: discount or ``lambda_`` outside [0, 1], a bound that is not positive, flags that are not bool, or
            a step that terminated without being done.
        ShapeError: the tensors are not of one shape.
        NonFiniteError: a reward or a value that counts is NaN or infinite, or a log-ratio is NaN, with stream and step
            named; or a ratio without bound overflows.

    Example:
        >>> import torch
        >>> from scorefn.trajectories import vtrace
        >>> rewards, values = torch.ones(1, 3), torch.full((1, 3), 2.0)
        >>> last = torch.tensor([[False, False, True]])
        >>> # the policy takes these actions e^5 times as often: cut to rho_bar = 1
        >>> likelier = torch.full((1, 3), 5.0)
        >>> vtrace(rewards, values, values, last, last, likelier, discount=1.0).targets
        tensor([[3., 2., 1.]])
        >>> # what the policy would never do teaches nothing: V stays
        >>> never = torch.full((1, 3), -torch.inf)
        >>> vtrace(rewards, values, values, last, last, never, discount=1.0).targets
        tensor([[2., 2., 2.]])
    """
    check_fraction("discount", discount)
    check_fraction("lambda_", lambda_)
    for name, bound in (("rho_bar", rho_bar), ("c_bar", c_bar)):
        if not hasattr(bound, "__float__") or not bound > 0.0:
            raise ScorefnError(
                f"{name} must be above 0, but it is {bound!r}: ratios truncated there would teach nothing."
            )
    _check_shapes(
        rewards,
        values=values,
        next_values=next_values,
        terminated=terminated,
        done=done,
        log_ratio=log_ratio,
        mask=mask,
    )
    present = torch.ones_like(done) if mask is None else mask
    log_ratio = log_ratio.where(present, 0.0)
    delta = _differences(rewards, values, next_values, terminated, discount).where(present, 0.0)
    _check_finite(delta, mask, terminated, rewards=rewards, values=values, next_values=next_values)
    if bool((wrong := log_ratio.isnan()).any()):
        raise NonFiniteError(
            f"log_ratio is nan {_where(wrong)}: every advantage before it in the episode would be, too. Look at the "
            "log-probabilities that it is the difference of; where an action is impossible under both, mask the step."
        )
    rho, c = (log_ratio.clamp(max=math.log(bound)).exp() for bound in (rho_bar, c_bar))
    if not bool(rho.isfinite().all() and c.isfinite().all()):
        raise NonFiniteError(
            f"The ratio exp({log_ratio.max().item():.4g}) of policy and behaviour overflows: give rho_bar and c_bar "
            "finite values."
        )
    values = values.where(present, 0.0)
    goes_on = _goes_on(done, mask)
    beyond = linear_recurrence(rho * delta, discount * lambda_ * c * goes_on.to(c), reverse=True, dim=-1)
    targets = (values + beyond).where(present, 0.0)
    following = torch.cat([targets[..., 1:], torch.zeros_like(targets[..., :1])], -1).where(goes_on, next_values)
    advantages = rho * _differences(rewards, values, following, terminated, discount)
    return VTrace(targets, advantages.where(present, 0.0))


def _differences(rewards: Tensor, values: Tensor, next_values: Tensor, terminated: Tensor, discount: float) -> Tensor:
    return rewards + discount * next_values.where(~terminated, 0.0) - values


def _goes_on(done: Tensor, mask: Tensor | None) -> Tensor:
    """Whether the next column is the next step of the same episode."""
    goes_on = ~done
    goes_on[..., -1] = False
    if mask is not None:
        goes_on[..., :-1] &= mask[..., 1:]
    return goes_on


def _check_shapes(rewards: Tensor, **others: Tensor | None) -> None:
    if not isinstance(rewards, Tensor):
        raise ShapeError(
            f"rewards are a {type(rewards).__name__}, but they must be a tensor [N, T]: use torch.as_tensor(rewards)."
        )
    if rewards.ndim < 1 or rewards.shape[-1] < 1:
        raise ShapeError(f"rewards must be [N, T] with T at least 1, but their shape is {tuple(rewards.shape)}.")
    for name, tensor in others.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise ShapeError(
                f"{name} is a {type(tensor).__name__}, but it must be a tensor [N, T] beside rewards of shape "
                f"{tuple(rewards.shape)}: use torch.as_tensor({name})."
            )
        if tensor.shape != rewards.shape:
            raise ShapeError(
                f"{name} has shape {tuple(tensor.shape)}, but rewards [N, T] have {tuple(rewards.shape)}: one number "
                "per step is needed everywhere, and none is made by broadcasting."
            )
        if name in ("terminated", "done", "mask") and tensor.dtype != torch.bool:
            raise ScorefnError(f"{name} must be bool, but it is {tensor.dtype}: pass {name}.bool().")
    terminated, done, mask = (others.get(name) for name in ("terminated", "done", "mask"))
    if terminated is not None and done is not None:
        wrong = terminated & ~done if mask is None else terminated & ~done & mask
        if bool(wrong.any()):
            raise ScorefnError(
                f"terminated is True but done is False {_where(wrong)}: a task that is over ends its episode, and what "
                "follows would be charged across its end. Pass done = terminated | truncated."
            )


def _check_finite(total: Tensor, mask: Tensor | None, terminated: Tensor, **parts: Tensor) -> None:
    """Refuse what makes ``total`` NaN or infinite where there is a step."""
    if math.isfinite(total.sum().item()) or bool(total.isfinite().all()):
        return
    for name, tensor in parts.items():
        bad = ~tensor.isfinite()
        if mask is not None:
            bad &= mask
        if name == "next_values":
            bad &= ~terminated
        if bool(bad.any()):
            raise NonFiniteError(
                f"{name} are {tensor[bad][0].item()} {_where(bad)}: every "
                "advantage before it in the episode would be, too. Look at where it comes from, or mask what is no "
                "step."
            )
    raise NonFiniteError("The temporal differences overflow: rewards or values are too large for their dtype.")


def _where(wrong: Tensor) -> str:
    """The first place, in words."""
    *stream, step = wrong.nonzero()[0].tolist()
    return f"in step {step}" + (f" of stream {', '.join(map(str, stream))}" if stream else "")
