"""What the behaviour said of its own actions in some steps of a record, so that it can be asked again."""

from __future__ import annotations

from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from scorefn.core import PyTree
from scorefn.trajectories.spaces import action_distribution, is_recurrent, recurrent_step


class Recorded(Enum):
    """The steps of which the behaviour's log-probabilities are kept."""

    NOTHING = 0
    FIRST = 1
    MANY = 2  # the first sixteen, then about every eighth more: 16, 18, 20, 22, 24, 27, ...

    def after(self, step: int) -> int:
        """The next step to look at; -1: none."""
        if self is not Recorded.MANY:
            return -1
        return step + max(1, step // 8)


class Behaviour(NamedTuple):
    """Log-probabilities ``[num_envs]`` of one step's actions under the distribution that they were drawn from.

    With what the policy was called with, so that it can be asked again.
    """

    step: int
    log_prob: Tensor
    observations: PyTree
    state: PyTree
    actions: Tensor

    @torch.no_grad()
    def again(self, policy: nn.Module, stream: int) -> Tensor:
        """What the policy says now of one stream's action, a scalar.

        It is called with as many streams as then, all of them this one: what does not depend on the others is computed
        by the same operations in the same order, and so to the same bit.
        """

        def alone(leaf: Any) -> Any:
            return leaf[stream].expand_as(leaf).contiguous() if isinstance(leaf, Tensor) else leaf

        observations, state, actions = pytree.tree_map(alone, (self.observations, self.state, self.actions))
        if is_recurrent(policy):
            distribution, _ = recurrent_step(policy, observations, state)
        else:
            distribution = action_distribution(policy, observations)
        log_prob: Tensor = distribution.log_prob(actions)
        return log_prob[stream]
