"""Whether a policy's actions are those of the environment: its distribution at first, the actions in every step."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, constraints

from scorefn.core import NonFiniteError, ScorefnError, ShapeError
from scorefn.trajectories.listing import few
from scorefn.trajectories.multi_categorical import MultiCategorical
from scorefn.trajectories.policies import CategoricalPolicy, MultiCategoricalPolicy
from scorefn.trajectories.spaces import VectorEnvironment, policy_fault

_SPACES = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)


def draws_within(policy: nn.Module) -> bool:
    """Whether a policy's type says that it draws one of its values, so that one comparison of their number will do.

    The comparison in every step costs 3 % of a step of the quickest environment, so that these two are spared it.
    """
    return type(policy) in (CategoricalPolicy, MultiCategoricalPolicy) and "act" not in vars(policy)


class ActionGate:
    """What the environment is given for the policy's samples: in every step only actions that it has.

    It is asked in every step, but for policies that ``draws_within`` names, whose first step is enough.

    The actions of a density may leave a Box of floats, whose wrappers clip them; integers may leave nothing. Where the
    least action is 0 both ends are compared at once: a negative integer, read as an unsigned one, is beyond any end.

    Args:
        env: the environment.
        policy: the policy, for what is said of it.
    """

    def __init__(self, env: VectorEnvironment, policy: nn.Module) -> None:
        space: Any = env.single_action_space
        self.space, self.policy = space, policy
        self.dtype, self.shape = np.dtype(env.action_space.dtype), (env.num_envs, *(space.shape or ()))
        self.density = isinstance(space, spaces.Box) and np.dtype(space.dtype).kind == "f"
        self.own_contains = type(space).contains not in [kind.contains for kind in _SPACES]
        self.unsigned: Any = None  # the dtype to read integers in, where one comparison with top is enough
        if self.density:
            return
        self.low, self.high = (np.asarray(end) for end in _space_range(space))
        if self.dtype.kind not in "iu" or self.high.size == 0 or self.own_contains:
            return
        if np.all(self.low == 0) and np.all(self.high == self.high.flat[0]):
            self.unsigned, self.top = np.dtype(f"u{self.dtype.itemsize}"), int(self.high.flat[0])

    def __call__(self, given: Tensor, sampled: Tensor, t: int) -> Any:
        """The actions of step t as an array ``[num_envs, *act]`` of the environment's dtype.

        Args:
            given: what the environment is to get.
            sampled: what was drawn; the same tensor unless the policy's ``executed`` made another one of it.
            t: the step, for what is said of it.

        Raises:
            ShapeError: they are not one action per stream.
            NonFiniteError: what was drawn is NaN, infinite or larger than any integer, and so no action.
            ScorefnError: the action space has them not.
        """
        array = (given.float() if given.dtype is torch.bfloat16 else given).cpu().numpy()
        if self.unsigned is not None and array.dtype == self.dtype and array.shape == self.shape:
            positive = array.view(self.unsigned)
            if positive.item(positive.argmax()) <= self.top:  # an argmax costs a third of a maximum
                return array
        if array.shape != self.shape:
            made = "" if given is sampled else "'s method executed"
            raise ShapeError(
                f"The policy{made} acted with shape {array.shape}, but {self.shape[0]} streams with actions from "
                f"{self.space} need {self.shape}: return one action per stream."
            )
        actions = array
        if array.dtype != self.dtype:
            with np.errstate(invalid="ignore", over="ignore"):
                actions = array.astype(self.dtype)
            if not self.density and (bad := actions != array).any():  # cut off, or wrapped around
                self._refuse(array, bad, given, sampled, t)
        if self.density:
            if given is not sampled and actions.size and math.isnan(actions.item(actions.argmax())):
                self._refuse(array, np.isnan(array), given, sampled, t)
            return actions
        if (bad := (actions < self.low) | (actions > self.high)).any():
            self._refuse(array, bad, given, sampled, t)
        if self.own_contains:
            bad = [not self.space.contains(actions[i : i + 1].reshape(self.shape[1:])) for i in range(self.shape[0])]
            if any(bad):
                self._refuse(array, np.array(bad), given, sampled, t)
        return actions

    def _refuse(self, array: Any, bad: Any, given: Tensor, sampled: Tensor, t: int) -> None:
        """Say who made the actions, and of what."""
        streams = bad.reshape(len(bad), -1).any(1).nonzero()[0]
        if sampled.is_floating_point() and sampled.shape == given.shape:
            drawn = sampled.flatten(1) if sampled.ndim > 1 else sampled.unsqueeze(1)
            lost = ~(drawn.abs() < 2.0**63)  # NaN too
            if bool(lost.any()):
                stream, part = lost.nonzero()[0].tolist()
                raise _not_finite(self.policy, drawn[stream, part].item(), stream, t)
        some = f"{few(array[streams])} for {len(streams)} of {len(array)} streams in step {t}"
        if given is not sampled:
            samples = few(sampled.detach().float().cpu().numpy()[streams]) if len(sampled) == len(array) else "drawn"
            raise ScorefnError(
                f"The policy's method executed made the actions {some} of the samples {samples}, which are not in "
                f"{self.space}: the environment was not stepped. Let executed map every sample into the space"
                f"{self._example()}."
            )
        act = "act must draw from the distribution that forward returns, and " if hasattr(self.policy, "act") else ""
        raise ScorefnError(
            f"The policy chose the actions {some}, which are not in {self.space}: {act}the support of its "
            "distribution must be the action space, as that of Categorical is."
        )

    def _example(self) -> str:
        if self.density:
            return ", each to a number"
        if np.all(self.low == self.low.flat[0]) and np.all(self.high == self.high.flat[0]):
            return f", such as actions.clamp({self.low.flat[0]}, {self.high.flat[0]}).long()"
        return ", such as actions.long().clamp(low, high) with the ends of the space as tensors"


def _not_finite(policy: nn.Module, value: float, stream: int, t: int) -> NonFiniteError:
    """A draw that is no number, or one that only a parameter that is not finite has: ``Poisson(inf)`` gives -2^63."""
    said = f"The action of stream {stream} in step {t} is {value:g}"
    if abs(value) < float("inf"):
        said += ", beyond every integer, so that a parameter of its distribution (a rate) was not finite or too large"
    return policy_fault(policy, said)


def check_distribution(distribution: Distribution, env: VectorEnvironment, sampled: Tensor, given: Tensor) -> None:
    """Raise where samples of the policy's distribution are no actions of env.

    Args:
        distribution: what the policy returned.
        env: the environment.
        sampled: actions of it.
        given: what the environment is to get for them: the same ones, unless the policy has ``executed``.
    """
    space = env.single_action_space
    name = type(distribution).__name__
    batch, event, wanted = tuple(distribution.batch_shape), tuple(distribution.event_shape), tuple(space.shape or ())
    if batch != (env.num_envs,) or event != wanted:
        if wanted:
            repair = "declare action dimensions with torch.distributions.Independent(distribution, 1)"
        elif isinstance(_innermost(distribution), Categorical):
            repair = "an action is one number, so give it logits of shape [N, A]; of [N, 1, A], squeeze(-2)"
        else:
            repair = (
                "an action is one number, so give it parameters of shape [N], such as network(observations).squeeze(-1)"
                ", without Independent"
            )
        raise ShapeError(
            f"The policy returned {name} of batch shape {batch} and event shape {event}, but {env.num_envs} streams "
            f"with actions from {space} need batch shape {(env.num_envs,)} and event shape {wanted}, for "
            f"one log-probability per action: {repair}."
        )
    discrete = _is_discrete(distribution)
    integers = np.dtype(space.dtype).kind in "biu"
    if isinstance(space, spaces.Box) and integers:
        if discrete is False and given.is_floating_point():
            raise ScorefnError(
                f"The policy returned {type(_innermost(distribution)).__name__}, which is continuous, but the action "
                f"space is {space}, of integers: what "
                "it samples would be cut off on its way to the environment. Use a distribution over integers, such as "
                "MultiCategorical, or let the policy's method executed(actions) make integers of them, such as "
                "actions.round().long()."
            )
    elif discrete is not None and discrete == isinstance(space, spaces.Box):
        raise ScorefnError(
            f"The policy returned {name}, which is {'discrete' if discrete else 'continuous'}, but the action space is "
            f"{space}: use {'a density such as Normal' if discrete else 'Categorical'}, or another environment"
            f"{', or declare an integer Box or Discrete in this one' if discrete else ''}."
        )
    if isinstance(inner := _innermost(distribution), MultiCategorical):
        sizes = (
            tuple(map(int, space.nvec.flatten())) if isinstance(space, spaces.MultiDiscrete)
            else (2,) * wanted[0] if isinstance(space, spaces.MultiBinary)
            else inner.counts
        )  # fmt: skip
        if inner.counts != sizes:
            raise ScorefnError(
                f"The policy chooses among {list(inner.counts)} values, but the action space is {space}: give it "
                f"counts={list(sizes)}, and let its network return their sum, {sum(sizes)} logits."
            )
    categories = _categories(distribution)
    counts = _action_counts(space)
    if categories is not None and counts is not None and {categories} != counts:
        raise ScorefnError(
            f"The policy chooses among {categories} actions, but the action space is {space}: let its network return "
            f"{' or '.join(map(str, sorted(counts)))} logits."
        )
    if integers and discrete and given is sampled and (categories is None or counts is None):
        _check_values(distribution, space)


def _check_values(distribution: Distribution, space: spaces.Space[Any]) -> None:
    """Refuse a discrete distribution that has values which the action space has not."""
    values, allowed = _integer_range(distribution), _space_range(space)
    if values is None or (bool(np.all(values[0] >= allowed[0])) and bool(np.all(values[1] <= allowed[1]))):
        return
    low, high = float(np.min(values[0])), float(np.max(values[1]))
    raise ScorefnError(
        f"The policy returned {type(_innermost(distribution)).__name__}, whose values go from {low:g} to {high:g}, but "
        f"the action space is {space}: sooner or later the environment would get an action that it does not have. Use "
        "Categorical or MultiCategorical with its counts, or give the policy a method executed(actions) that maps "
        "them into the space."
    )


def _integer_range(distribution: Distribution) -> tuple[Any, Any] | None:
    """The least and the largest value of a discrete distribution, infinite where there is none; None: not declared."""
    support: Any = distribution.support
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    if isinstance(support, type(constraints.boolean)):
        return 0, 1
    bounds = [getattr(support, name, None) for name in ("lower_bound", "upper_bound")]
    if bounds == [None, None]:
        return None
    low, high = (
        default if bound is None else bound.cpu().numpy() if isinstance(bound, Tensor) else bound
        for bound, default in zip(bounds, (-np.inf, np.inf), strict=True)
    )
    return low, high


def _space_range(space: Any) -> tuple[Any, Any]:
    """The least and the largest integer of an action space."""
    if isinstance(space, spaces.Box):
        return space.low, space.high
    if isinstance(space, spaces.MultiBinary):
        return 0, 1
    return space.start, space.start + (space.n if isinstance(space, spaces.Discrete) else space.nvec) - 1


def _is_discrete(distribution: Distribution) -> bool | None:
    try:
        support: Any = distribution.support
        return bool(support.is_discrete)
    except (NotImplementedError, AttributeError):  # nothing declared, nothing to judge
        return None


def _innermost(distribution: Distribution) -> Distribution:
    while isinstance(distribution, Independent):
        distribution = distribution.base_dist
    return distribution


def _categories(distribution: Distribution) -> int | None:
    inner = _innermost(distribution)
    return int(inner.logits.shape[-1]) if isinstance(inner, Categorical) else None


def _action_counts(space: spaces.Space[Any]) -> set[int] | None:
    if isinstance(space, spaces.Discrete):
        return {int(space.n)}
    if isinstance(space, spaces.MultiDiscrete):
        return {int(n) for n in space.nvec.flatten()}
    return {2} if isinstance(space, spaces.MultiBinary) else None
