"""Policies without floating parameters, without declared bounds, or that fail on observations of several parts."""

import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import SyncVectorEnv
from torch import nn
from torch.distributions import Categorical, Poisson, constraints

import scorefn as sf
from scorefn.trajectories import rollout
from scorefn.trajectories.memory import Memory
from tests.trajectories.still_environment import PLAIN, Family, Still, still


class Table(nn.Module):
    """Logits that are a buffer: no parameter at all, or one that is an integer."""

    def __init__(self, integers):
        super().__init__()
        self.register_buffer("logits", torch.tensor([0.5, -0.5]))
        if integers:
            self.visits = nn.Parameter(torch.zeros(2, dtype=torch.int64), requires_grad=False)

    def forward(self, observations):
        return Categorical(logits=self.logits.expand(*observations.shape[:-1], 2))


@pytest.mark.parametrize("integers", [False, True])
def test_a_policy_without_floating_parameters_is_recorded_in_the_default_dtype(integers):
    record = rollout(still(spaces.Discrete(2)), Table(integers), 3)
    assert record.observations.dtype == torch.get_default_dtype()
    assert record.observations.device.type == "cpu"
    assert record.mask.shape == (3, 3)
    assert record.mask.all()


def test_a_policy_that_fails_on_observations_of_several_parts_is_told_their_shapes():
    class Parts(Still):
        def __init__(self):
            super().__init__(spaces.Discrete(2))
            self.observation_space = spaces.Dict(
                {"place": spaces.Box(-1, 1, (2,)), "pair": spaces.Tuple((PLAIN, spaces.Box(0, 1, (4,))))}
            )

        def reset(self, *, seed=None, options=None):
            return self.observation_space.sample(), {}

    class Fails(nn.Module):
        def forward(self, observations):
            raise KeyError("velocity")

    with pytest.raises(KeyError, match="velocity") as caught:
        rollout(SyncVectorEnv([Parts] * 3), Fails(), 3)
    (note,) = caught.value.__notes__
    assert note == ("scorefn called Fails with observations of shape {'pair': ((3, 2), (3, 4)), 'place': (3, 2)}.")


class Even(Poisson):
    """A discrete family whose support says that it is discrete, and not from where to where."""

    class _Support(constraints.Constraint):
        is_discrete = True

        def check(self, value):
            return value % 2 == 0

    support = _Support()


def test_a_support_without_bounds_is_taken_at_its_word_until_an_action_leaves_the_space():
    record = rollout(still(spaces.Discrete(1000)), Family(lambda v: Even(v.exp(), validate_args=False)), 3)
    assert record.mask.all()
    always = Family(lambda v: Even(0 * v + 1e4, validate_args=False))
    with pytest.raises(
        sf.ScorefnError, match=r"^The policy chose the actions \[.*\] for 3 of 3 .*, which are not in Discrete"
    ):
        rollout(still(spaces.Discrete(1000)), always, 3)


def test_actions_that_a_policy_maps_to_another_shape_are_refused():
    policy = Family(lambda v: Categorical(logits=torch.stack([v, -v], -1)))
    policy.executed = lambda actions: actions.unsqueeze(-1).expand(-1, 2)
    with pytest.raises(sf.ShapeError, match=r"acted with shape \(3, 2\), but 3 streams .* need \(3,\): return one"):
        rollout(still(spaces.Discrete(2)), policy, 3)


def test_finite_numbers_whose_sum_overflows_are_no_fault():
    large = torch.full((2, 3), 3e38)
    Memory._check_finite("log-probability", large)
    Memory._check_finite("action", torch.tensor([[2**62]]))
    large[1, 2] = np.inf
    with pytest.raises(sf.NonFiniteError, match="^The log-probability of stream 1 in step 2 is inf"):
        Memory._check_finite("log-probability", large)
