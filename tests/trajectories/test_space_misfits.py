"""Policies that do not fit the spaces, and parameters that are NaN."""

import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import SyncVectorEnv
from torch import distributions as td
from torch import nn

import scorefn as sf
from scorefn.trajectories import (
    CategoricalPolicy,
    Clip,
    GaussianPolicy,
    MultiCategoricalPolicy,
    SegmentDistribution,
    Streams,
    TrajectoryDistribution,
    rewards,
    rollout,
)
from tests.trajectories.corridor import MODES
from tests.trajectories.still_environment import Family, Rounding, Still, still

THREES = spaces.MultiDiscrete([3, 3])
INTEGERS = spaces.Box(0, 10, (1,), np.int64)
COUNTED = {"two": [3, 2], "four": [4, 3], "the other way round": [3, 4]}


@pytest.mark.parametrize("counts", COUNTED.values(), ids=COUNTED)
def test_counts_that_are_not_those_of_the_space_are_refused_before_the_first_step(counts):
    with pytest.raises(sf.ScorefnError, match=r"among \[.*\] values, but .*MultiDiscrete\(\[3 3\]\).*counts=\[3, 3\]"):
        rollout(still(THREES), MultiCategoricalPolicy(nn.Linear(2, sum(counts)), counts), 3)


def test_counts_on_switches_are_two_each():
    policy = MultiCategoricalPolicy(nn.Linear(2, 6), [2, 2, 2])
    assert rollout(still(spaces.MultiBinary(3)), policy, 3).mask.all()
    with pytest.raises(sf.ScorefnError, match=r"counts=\[2, 2\]"):
        rollout(still(spaces.MultiBinary(2)), MultiCategoricalPolicy(nn.Linear(2, 4), [3, 1]), 3)


def test_choices_that_do_not_start_at_0_are_refused():
    env = still(spaces.MultiDiscrete([3, 3], start=[1, 0]))
    with pytest.raises(sf.ScorefnError, match="does not start at 0"):
        rollout(env, MultiCategoricalPolicy(nn.Linear(2, 6), [3, 3]), 3)


UNBOUNDED = {
    "Poisson": lambda h: td.Poisson(h.exp() * 0.01),
    "Geometric": lambda h: td.Geometric(logits=h + 9),
    "Binomial": lambda h: td.Binomial(50, logits=h - 30),
}


@pytest.mark.parametrize("space", [spaces.Discrete(40), spaces.Box(0, 40, (), np.int64)], ids=["Discrete", "Box"])
@pytest.mark.parametrize("name", UNBOUNDED)
def test_a_support_that_leaves_the_space_is_refused_even_if_the_first_actions_do_not(name, space):
    with pytest.raises(sf.ScorefnError, match=rf"returned {name}, whose values go from 0 to (inf|50), but .*executed"):
        rollout(still(space), Family(UNBOUNDED[name]), 3)


def test_a_policy_may_map_any_support_into_the_space():
    policy = Family(UNBOUNDED["Poisson"])
    policy.executed = lambda actions: actions.clamp(max=1)
    assert rollout(still(spaces.Discrete(2)), policy, 3).mask.all()


def test_a_density_on_a_box_of_integers_is_refused():
    for bounds in (None, Clip([0.0], [10.0])):
        policy = GaussianPolicy(nn.Linear(2, 1), torch.zeros(1), bounds=bounds)
        with pytest.raises(
            sf.ScorefnError, match=r"Normal, which is continuous.*int64\), of integers: .* cut off.*long"
        ):
            rollout(still(INTEGERS), policy, 3)


def test_a_density_that_makes_integers_of_its_actions_is_served():
    draws = sf.draw(TrajectoryDistribution(still(INTEGERS), Rounding(nn.Linear(2, 1), torch.zeros(1))), rewards, 3)
    assert not torch.equal(draws.x.actions, draws.x.actions.round())  # scored as sampled


def test_a_discrete_density_on_a_box_of_integers_is_served():
    env = still(INTEGERS)
    actions = rollout(env, MultiCategoricalPolicy(nn.Linear(2, 11), [11]), 3).actions
    assert actions.dtype == torch.int64
    assert [e.unwrapped.seen.item() for e in env.envs] == actions[:, -1, 0].tolist()
    with pytest.raises(sf.ScorefnError, match=r"MultiCategorical, whose values go from 0 to 11, but .*Box\(0, 10"):
        rollout(env, MultiCategoricalPolicy(nn.Linear(2, 12), [12]), 3)


WIDE = {"uint16": 2**16 - 1, "uint32": 2**32 - 1, "uint64": 2**62 + 1, "longdouble": 0.5}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", WIDE)
def test_observations_that_torch_does_not_compute_with_are_kept_exactly(name, mode):
    space = spaces.Box(0, 2**63 - 1 if name == "uint64" else WIDE[name], (2,), np.dtype(name))
    env = SyncVectorEnv([lambda: Still(spaces.Discrete(2), space, WIDE[name])] * 2, autoreset_mode=mode)
    policy = Family(lambda h: td.Categorical(logits=torch.stack([h, -h], -1) * 1e-20))
    record = Streams(env, policy).segment(8)
    for kept in (record.observations, record.next_observations):
        assert kept.dtype == {"uint16": torch.int32, "longdouble": torch.float32}.get(name, torch.int64)
        assert bool((kept[record.mask] == WIDE[name]).all())


def test_integers_too_large_for_any_tensor_are_refused_with_the_environment():
    space = spaces.Dict(a=spaces.Box(0, 2**64 - 1, (2,), np.uint64))
    with pytest.raises(sf.ScorefnError, match=r"observation space is Dict\(.*above 9223372036854775807.*smaller high"):
        Streams(still(spaces.Discrete(2), space), CategoricalPolicy(nn.Linear(2, 2)))


def test_numbers_in_a_space_of_integers_are_not_cut_off():
    class Halves(SyncVectorEnv):
        def reset(self, **arguments):
            observation, info = super().reset(**arguments)
            return observation + 0.5, info

    env = Halves([lambda: Still(spaces.Discrete(2), spaces.Box(0, 9, (2,), np.int64))] * 2)
    with pytest.raises(sf.ScorefnError, match=r"observations of float64, but .*int64\): they would be cut off"):
        rollout(env, CategoricalPolicy(nn.Linear(2, 2)), 2)


# --------------------------------------------------------------------------------------------------------- NaN policies


class Gaussian(Still):
    def __init__(self):
        super().__init__(spaces.Box(-1.0, 1.0, (2,), np.float32))

    def step(self, action):
        if not np.isfinite(action).all():
            raise RuntimeError("the simulator does not like this")
        return super().step(action)


def broken(policy, value=torch.nan):
    with torch.no_grad():
        next(policy.parameters())[0] = value
    return policy


@pytest.mark.parametrize("kind", [Still, Gaussian])
def test_parameters_that_are_nan_are_named(kind):
    env = SyncVectorEnv([kind if kind is Gaussian else lambda: Still(spaces.Box(-1.0, 1.0, (2,), np.float32))] * 2)
    policy = broken(GaussianPolicy(nn.Linear(2, 2), torch.zeros(2)))
    with pytest.raises(
        sf.NonFiniteError, match=r"action of stream 0 in step 0 is nan, though the observation.*'log_scale' holds nan"
    ):
        rollout(env, policy, 2)
    policy = broken(CategoricalPolicy(nn.Linear(2, 2)))
    for p in (TrajectoryDistribution, lambda env, policy: SegmentDistribution(env, policy, 5)):
        with pytest.raises(sf.NonFiniteError, match=r"stream 0 in step 0 is nan.*parameter 'network.weight' holds nan"):
            sf.draw(p(still(spaces.Discrete(2)), policy), rewards, 3)


def test_parameters_that_overflow_are_told_from_those_that_are_nan():
    policy = broken(CategoricalPolicy(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))), 3e38)
    with pytest.raises(sf.NonFiniteError, match=r"is nan, though .* parameters are finite, so that they overflow"):
        sf.draw(TrajectoryDistribution(still(spaces.Discrete(2)), policy), rewards, 3)


def test_a_nan_observation_is_not_blamed_on_the_policy():
    class Blind(Still):
        def step(self, action):
            observation, *rest = super().step(action)
            return (observation * np.nan if self.time == 2 else observation), *rest

    env = SyncVectorEnv([lambda: Blind(spaces.Box(-1.0, 1.0, (2,), np.float32))] * 2)
    with pytest.raises(sf.NonFiniteError, match="observation of stream 0 in step 2 is nan"):
        rollout(env, GaussianPolicy(nn.Linear(2, 2), torch.zeros(2)), 2)


def test_an_action_outside_the_support_that_scores_it_is_named():
    policy = Family(lambda h: td.Categorical(logits=torch.stack([h, h - torch.inf], -1)))
    policy.act = lambda observations: torch.ones(len(observations), dtype=torch.int64)
    with pytest.raises(sf.NonFiniteError, match=r"action of stream 0 in step 0 the log-probability -inf.*support"):
        sf.draw(TrajectoryDistribution(still(spaces.Discrete(2)), policy), rewards, 3)
