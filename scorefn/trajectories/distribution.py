"""Structured measures of T decisions and T values: whole episodes, and segments of streams that go on."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from scorefn.core import (
    Coupling,
    Credit,
    Draws,
    Independent,
    Integrand,
    NonFiniteError,
    ScorefnError,
    ShapeError,
    Total,
    check_count,
    check_support,
    evaluate,
)
from scorefn.core.representation import called
from scorefn.reducers import RewardToGo
from scorefn.trajectories.behaviour import Recorded
from scorefn.trajectories.interaction import Record
from scorefn.trajectories.record import Trajectories
from scorefn.trajectories.rollouts import joined, record_episodes
from scorefn.trajectories.spaces import (
    Environment,
    action_distribution,
    check_policy,
    is_recurrent,
    policy_fault,
    reference,
    unrolled_distribution,
    vectorised,
)
from scorefn.trajectories.streams import Streams

_ROUNDING = 16  # units in the last place of 1 + |log p|
_CHECKED_STEPS = 64  # after the first use a segment's behaviour is looked at once in so many steps


class TrajectoryDistribution:
    """Episodes of an environment under a policy: ``p(tau) = p(s_0) prod_t policy(a_t | s_t) p(r_t, s_t+1 | s_t, a_t)``.

    The environment's factors do not depend on the policy's parameters, so they vanish from the score, unknown as they
    are (Williams, 1992); only the policy's log-probabilities are kept, one decision a step.

    f maps the ``Trajectories`` to ``[N, T]``, one value per step, charged to the actions up to it (reward-to-go,
    undiscounted), or to ``[N]``, one value of the whole episode, charged to all. Values of absent steps count as 0. The
    observations are the draws' context, so that ``ValueFunction(module)`` reads them, ``[N, T, *obs] -> [N, T, 1]``.

    What was sampled is what is scored: the log-probabilities of the first actions are compared with those of the
    distribution that they were drawn from, and on first use those of later steps too.

    Args:
        env: any Gymnasium environment; see ``rollout``.
        policy: a module that maps observations to a distribution over actions.
        max_steps: an episode that is not over by then counts as truncated; None: as long as it takes.

    Raises:
        ScorefnError: env is no environment whose spaces can be recorded, or policy is not a module.

    Example:
        >>> import gymnasium, scorefn as sf
        >>> from torch import nn
        >>> from scorefn.trajectories import CategoricalPolicy, TrajectoryDistribution, rewards
        >>> policy = CategoricalPolicy(nn.Linear(4, 2))
        >>> p = TrajectoryDistribution(gymnasium.make("CartPole-v1"), policy, max_steps=5)
        >>> # REINFORCE: reward-to-go, leave-one-out
        >>> (-sf.expectation(p, rewards, num_samples=4)).backward()
        >>> policy.network.weight.grad.shape
        torch.Size([2, 4])
    """

    def __init__(self, env: Environment, policy: nn.Module, *, max_steps: int | None = None) -> None:
        self.env = vectorised(env)
        check_policy(policy)
        self.policy, self.max_steps = policy, max_steps
        self._used = False

    def __repr__(self) -> str:
        return called(self, self.env, self.policy, max_steps=self.max_steps)

    def draws(self, f: Integrand, num_samples: int, *, coupling: Coupling | None = None) -> Draws:
        """Roll out without gradient, call f once, score all present actions at once.

        Args:
            f: ``Trajectories -> [N, T]`` or ``[N]``.
            num_samples: N episodes.
            coupling: none but ``Independent``: an environment draws its own random numbers.

        Raises:
            ShapeError: f returned another shape, or what ``rollout`` refuses.
            NonFiniteError: a reward, an observation, a value or a log-probability is NaN or infinite.
            SupportError: the support of the policy's distribution moves with a parameter that requires grad.
            ScorefnError: a coupling, a policy that does not fit the environment or has an action in some step that is
                not in its action space, or one that scores what it sampled otherwise than it sampled it.
        """
        _refuse_coupling(coupling)
        behaviour = Recorded.FIRST if self._used else Recorded.MANY
        rounds = record_episodes(self.env, self.policy, num_samples, self.max_steps, behaviour)
        trajectories = joined(rounds)
        log_prob = log_probabilities(self.policy, trajectories)
        _check_finite(self.policy, trajectories.mask, log_prob)
        _check_same(self.policy, rounds, trajectories.mask, log_prob)
        self._used = True
        fx, credit = _valued(evaluate(f, trajectories, log_prob), trajectories, RewardToGo())
        return Draws(
            trajectories, log_prob, fx, credit=credit, mask=trajectories.mask, context=trajectories.observations
        )


class SegmentDistribution:
    """Segments of ``steps`` rows of streams that go on: each draw is the next segment of one stream.

    The distribution is conditional on where the streams are, whatever policies took them there, and each draw moves
    them on: an update every so many steps instead of every so many episodes. f maps the ``Trajectories`` to ``[N, T]``,
    one value per step, charged to the actions of the same episode up to it, or to ``[N]``, one value of the segment,
    charged to all. Within a segment rewards after its end are not seen: with f the rewards themselves they count as
    nothing, which pays a policy for being quick; with temporal-difference errors a value function stands for them.
    ``returns`` refuses segments, for their episodes are not whole. Discounts count from the segment's or the episode's
    first step, whichever is later.

    Args:
        env: any Gymnasium environment; see ``Streams``, to whom it belongs.
        policy: a module that maps observations to a distribution over actions.
        steps: T, the rows of a segment.

    Raises:
        ScorefnError: env is no environment whose spaces can be recorded, policy is not a module, or steps no count.

    Example:
        >>> import gymnasium, scorefn as sf
        >>> from torch import nn
        >>> from scorefn.trajectories import (
        ...     CategoricalPolicy,
        ...     SegmentDistribution,
        ...     TemporalDifference,
        ... )
        >>> policy, critic = CategoricalPolicy(nn.Linear(4, 2)), nn.Linear(4, 1)
        >>> p = SegmentDistribution(gymnasium.make_vec("CartPole-v1", num_envs=2), policy, steps=5)
        >>> # an actor with a critic
        >>> draws = p.draws(TemporalDifference(critic, discount=0.99), num_samples=2)
        >>> sf.surrogate(draws).mean().backward()
        >>> draws.fx.shape, policy.network.weight.grad.shape
        (torch.Size([2, 5]), torch.Size([2, 4]))
    """

    def __init__(self, env: Environment, policy: nn.Module, steps: int) -> None:
        self.streams, self.steps = Streams(env, policy), check_count("steps", steps)
        self.env, self.policy = self.streams.env, policy
        self._used, self._unchecked = False, 0

    def __repr__(self) -> str:
        return called(self, self.env, self.policy, steps=self.steps)

    def draws(self, f: Integrand, num_samples: int, *, coupling: Coupling | None = None) -> Draws:
        """The next segment of each stream, scored at once.

        Args:
            f: ``Trajectories -> [N, T]`` or ``[N]``.
            num_samples: N, the number of streams.
            coupling: none but ``Independent``: an environment draws its own random numbers.

        Raises:
            ScorefnError: another number of samples than there are streams; and what ``TrajectoryDistribution.draws``
                refuses.
        """
        _refuse_coupling(coupling)
        if check_count("num_samples", num_samples) != self.streams.num_envs:
            raise ScorefnError(
                f"num_samples is {num_samples}, but the environment has {self.streams.num_envs} streams, and each draw "
                f"is one stream's next segment: pass num_samples={self.streams.num_envs}, or make an environment of "
                f"{num_samples} streams."
            )
        behaviour = Recorded.MANY
        if self._used:
            behaviour = Recorded.FIRST if self._unchecked >= _CHECKED_STEPS else Recorded.NOTHING
        record = self.streams.record(self.steps, behaviour)
        trajectories = record.trajectories
        log_prob = log_probabilities(self.policy, trajectories)
        _check_finite(self.policy, trajectories.mask, log_prob)
        _check_same(self.policy, [record], trajectories.mask, log_prob)
        self._used, self._unchecked = True, self.steps + (self._unchecked if behaviour is Recorded.NOTHING else 0)
        # a row without a step is an end of its own, so that an age is counted from the step after it
        credit: Credit = RewardToGo(done=trajectories.done | ~trajectories.mask)
        fx, credit = _valued(evaluate(f, trajectories, log_prob), trajectories, credit)
        return Draws(
            trajectories, log_prob, fx, credit=credit, mask=trajectories.mask, context=trajectories.observations
        )


def _refuse_coupling(coupling: Coupling | None) -> None:
    if coupling is not None and not isinstance(coupling, Independent):
        raise ScorefnError(
            f"coupling={coupling!r} was given, but an environment draws its own random numbers, which cannot be "
            "coupled: leave coupling out; streams are independent."
        )


def log_probabilities(policy: nn.Module, trajectories: Trajectories) -> Tensor:
    """Log-probability of each action, ``[N, T]``, 0 where absent: one call of the policy.

    A memoryless policy is called with the present steps only, ``[M, *obs]``; a recurrent one with all, of which absent
    ones repeat a present step.

    Raises:
        SupportError: the support of the policy's distribution moves with a parameter that requires grad.
        ShapeError: its log-probabilities are not one per action.
    """
    mask = trajectories.mask
    present = mask.nonzero(as_tuple=True)
    if is_recurrent(policy):
        if len(present[0]) == 0:  # nothing that could stand in for absent steps, and nothing to score
            like = reference(policy)
            nothing = [like, *(q.flatten()[:0].to(like) for q in policy.parameters() if q.is_floating_point())]
            return like.new_zeros(mask.shape).index_put(present, torch.cat(nothing))

        def filled(leaf: Tensor) -> Tensor:
            some = leaf[present[0][0], present[1][0]]
            return torch.where(mask.reshape(*mask.shape, *[1] * (leaf.ndim - 2)), leaf, some)

        observations = pytree.tree_map(filled, trajectories.observations)
        distribution = unrolled_distribution(policy, observations, trajectories.starts, trajectories.state)
        log_prob = _scored(distribution, filled(trajectories.actions), mask.shape)
        return torch.where(mask, log_prob, 0.0)
    observations = pytree.tree_map(lambda leaf: leaf[present], trajectories.observations)
    scored = _scored(action_distribution(policy, observations), trajectories.actions[present], present[0].shape)
    return scored.new_zeros(mask.shape).index_put(present, scored)


def _scored(distribution: torch.distributions.Distribution, actions: Tensor, wanted: torch.Size) -> Tensor:
    """``log_prob(actions)`` of the wanted shape."""
    check_support(distribution)
    log_prob: Tensor = distribution.log_prob(actions)
    if log_prob.shape != wanted:
        if actions.shape == wanted:
            repair = "an action is one number, so let its parameters have that shape too, by squeeze(-1)"
        else:
            repair = "declare action dimensions with torch.distributions.Independent(distribution, 1)"
        raise ShapeError(
            f"The policy's log_prob of {wanted.numel()} actions has shape {tuple(log_prob.shape)}, but "
            f"{tuple(wanted)} is needed, one number per action: {repair}."
        )
    return log_prob


def _check_finite(policy: nn.Module, mask: Tensor, log_prob: Tensor) -> None:
    """Refuse log-probabilities ``[N, T]`` that are NaN or infinite, with stream and step named."""
    log_prob = log_prob.detach()
    if math.isfinite(log_prob.sum().item()) or not bool((bad := ~torch.isfinite(log_prob) & mask).any()):
        return
    step, stream = bad.T.nonzero()[0].tolist()
    value = log_prob[stream, step].item()
    if math.isnan(value):
        raise policy_fault(policy, f"The log-probability of the action of stream {stream} in step {step} is nan")
    raise NonFiniteError(
        f"The policy gives the action of stream {stream} in step {step} the log-probability {value}, though it sampled "
        "that action: no score exists there. An action must lie inside the support of the distribution that scores it; "
        "where act has its own way of sampling, let it draw from the distribution that forward returns."
    )


def _check_same(policy: nn.Module, rounds: list[Record], mask: Tensor, log_prob: Tensor) -> None:
    """Refuse a policy whose score is not that of what it did: log_prob ``[N, T]`` against the behaviour's.

    All steps at once are rounded otherwise than the streams of one step, by how much, depends on the policy: a small
    scale multiplies it. So where the two differ by more than a few units in the last place, the policy is asked again
    as it was then, for the stream where they differ most: one that has not changed, and looks at nothing else, gives
    the same answer. (One that is computed otherwise with a gradient, or by ``unrolled``, differs by more than that.)
    """
    scored, first = log_prob.detach(), 0
    eps = torch.finfo(scored.dtype).eps
    for part in rounds:
        count = len(part.trajectories.mask)
        for behaviour in part.behaviour:
            step, then = behaviour.step, behaviour.log_prob[:count]
            now, present = scored[first : first + count, step], mask[first : first + count, step]
            size = 1 + now.abs()
            gap = (then - now).abs() / size
            gap = gap.nan_to_num(torch.inf).where(present, 0.0)
            i = int(gap.argmax())
            if gap[i] <= _ROUNDING * eps:
                continue
            known = gap[i] <= 10 * eps**0.5  # beyond that no rounding is an excuse, whatever the policy says
            if not (known and (then[i] - behaviour.again(policy, i)).abs() <= _ROUNDING * eps * size[i]):
                raise ScorefnError(
                    f"The policy gave the action of stream {first + i} in step {step} the log-probability "
                    f"{then[i].item():.6g} when it acted and {now[i].item():.6g} when it was scored: the score would "
                    "not belong to what was sampled. Dropout and batch normalisation do this in training mode: call "
                    "policy.eval(), which keeps the gradient. So do running statistics that move within a rollout, "
                    "and parameters that change: update both after the gradient step."
                )
        first += count


def _valued(fx: Tensor, trajectories: Trajectories, per_step: Credit) -> tuple[Tensor, Credit]:
    """f's values as ``[N, J]``, and how they are charged."""
    mask = trajectories.mask
    if fx.shape == mask.shape:
        return torch.where(mask, fx, fx.new_zeros(())), per_step
    if fx.shape == mask.shape[:1]:
        return fx.unsqueeze(-1), Total()
    raise ShapeError(
        f"f returned shape {tuple(fx.shape)} for trajectories of shape [N, T] = {tuple(mask.shape)}: return one value "
        f"per step, {tuple(mask.shape)}, or one per stream, {tuple(mask.shape[:1])}."
    )
