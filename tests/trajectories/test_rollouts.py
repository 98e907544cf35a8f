"""Episodes are whole, each from its own stream, and the same in every autoreset mode."""

import gymnasium
import numpy as np
import pytest
import torch
from torch import nn

import scorefn as sf
from scorefn.core.protocols import tensor_leaves
from scorefn.trajectories import CategoricalPolicy, Trajectories, rollout
from tests.trajectories.corridor import MODES, SEQUENCES, Scripted, corridors, episode, network


@pytest.mark.parametrize("mode", MODES)
def test_the_record_is_that_of_the_first_episode_of_each_stream(mode):
    record = rollout(corridors(16, mode), Scripted(SEQUENCES), 16)
    assert isinstance(record, Trajectories)
    assert record.observations.shape == (16, 4, 2)
    endings = set()
    for i, actions in enumerate(SEQUENCES.tolist()):
        rows, terminated, truncated = episode(actions)
        length = len(rows)
        endings.add((length, terminated, truncated))
        wanted = torch.tensor(rows, dtype=torch.float64)
        assert record.mask[i].tolist() == [True] * length + [False] * (4 - length)
        assert torch.equal(record.observations[i, :length], wanted[:, :2])
        assert torch.equal(record.actions[i, :length], wanted[:, 2].long())
        assert torch.equal(record.rewards[i, :length], wanted[:, 3])
        assert record.terminated[i].nonzero().flatten().tolist() == ([length - 1] if terminated else [])
        assert record.truncated[i].nonzero().flatten().tolist() == ([length - 1] if truncated else [])
        for tensor in tensor_leaves(record):  # nothing of a later episode, and no filler row
            assert not tensor[i, length:].any()
    assert endings == {(2, True, False), (3, True, False), (4, True, True), (4, False, True)}
    assert record.terminated.dtype == record.truncated.dtype == record.mask.dtype == torch.bool


@pytest.mark.parametrize("mode", MODES[1:])
def test_sampled_records_are_the_same_in_every_autoreset_mode(mode):
    records = []
    for each in (MODES[0], mode):
        torch.manual_seed(3)
        records.append(rollout(corridors(5, each), CategoricalPolicy(network()), 12))
    for a, b in zip(*map(tensor_leaves, records), strict=True):
        assert torch.equal(a, b)


def cartpole(num_envs):
    return gymnasium.make_vec("CartPole-v1", num_envs=num_envs, vectorization_mode="vector_entry_point")


def test_one_torch_seed_reproduces_everything():
    env, policy = cartpole(4), CategoricalPolicy(nn.Linear(4, 2))
    np.random.seed(1)

    def record(seed):
        torch.manual_seed(seed)
        return rollout(env, policy, 6)

    first, second, other = record(1), record(1), record(2)
    np.random.seed(2)
    third = record(1)
    for a, b, c in zip(*map(tensor_leaves, (first, second, third)), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    assert not torch.equal(first.observations[:, 0], other.observations[:, 0])


def test_surplus_streams_are_left_out_by_index():
    env, policy = cartpole(6), CategoricalPolicy(nn.Linear(4, 2))
    torch.manual_seed(5)
    every = rollout(env, policy, 6)
    torch.manual_seed(5)
    some = rollout(env, policy, 3)
    length = some.mask.shape[1]
    assert some.mask.any(0).all()  # no column without a step
    for a, b in zip(*map(tensor_leaves, (some, every)), strict=True):
        assert torch.equal(a, b[:3, :length])


def test_rounds_are_padded_with_absent_steps():
    script = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])  # two steps and three; then a round that starts in mid-script
    policy = Scripted(script)
    record = rollout(corridors(2), policy, 3)
    assert record.mask.tolist()[:2] == [[True, True, False, False], [True, True, True, False]]
    assert record.mask[2].all()  # 1, 0, 0, 1: truncated
    assert record.truncated[2].tolist() == [False, False, False, True]
    assert record.actions[2].tolist() == [1, 0, 0, 1]
    assert not record.observations[0, 2:].any()


@pytest.mark.parametrize("mode", MODES)
def test_max_steps_truncates(mode):
    record = rollout(corridors(16, mode), Scripted(SEQUENCES), 16, max_steps=2)
    assert record.mask.shape == (16, 2)
    over = record.terminated[:, -1]
    assert over.sum() == 4  # those that begin with two steps down
    assert torch.equal(record.truncated[:, -1], ~over)
    assert not record.truncated[:, 0].any()


def test_observations_take_the_dtype_of_the_policy_and_integers_keep_theirs():
    assert rollout(corridors(2), CategoricalPolicy(network().float()), 2).observations.dtype == torch.float32
    assert rollout(corridors(2), CategoricalPolicy(network()), 2).rewards.dtype == torch.float64
    env = gymnasium.make_vec("FrozenLake-v1", num_envs=2, vectorization_mode="sync")
    record = rollout(env, CategoricalPolicy(nn.Embedding(16, 4)), 2)
    assert record.observations.dtype == torch.int64
    assert record.rewards.dtype == torch.float32


def test_memory_that_the_environment_writes_to_again_is_copied():
    torch.manual_seed(0)
    policy = CategoricalPolicy(network())
    records = []
    for copy in (True, False):
        env = gymnasium.vector.SyncVectorEnv([lambda: corridors(1).envs[0]] * 3, copy=copy)
        torch.manual_seed(1)
        records.append(rollout(env, policy, 3))
    assert torch.equal(records[0].observations, records[1].observations)


class Endless(gymnasium.Env):
    """Counts its steps; never over, and after step 5 not a number."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, what=None):
        self.what = what

    def reset(self, *, seed=None, options=None):
        self.time = 0
        return np.zeros(2), {}

    def step(self, action):
        self.time += 1
        observation = np.array([self.time, np.nan if self.what == "observation" and self.time > 5 else 0.0])
        return observation, np.nan if self.what == "reward" and self.time > 5 else self.time, False, False, {}


@pytest.mark.parametrize(("what", "step"), [("reward", 5), ("observation", 6)])
def test_what_went_astray_is_not_awaited(what, step):
    env = gymnasium.vector.SyncVectorEnv([Endless, lambda: Endless(what)])
    with pytest.raises(sf.NonFiniteError, match=f"The {what} of stream 1 in step {step} is nan"):
        rollout(env, CategoricalPolicy(network()), 2)


@pytest.mark.parametrize("steps", [127, 128, 129, 700])
def test_long_episodes_are_recorded_from_end_to_end(steps):
    record = rollout(gymnasium.vector.SyncVectorEnv([Endless] * 2), CategoricalPolicy(network()), 2, max_steps=steps)
    assert record.mask.shape == (2, steps)
    assert record.mask.all()
    count = torch.arange(steps, dtype=torch.float64).expand(2, -1)
    assert torch.equal(record.observations[..., 0], count)
    assert torch.equal(record.next_observations[..., 0], count + 1)
    assert torch.equal(record.rewards, count + 1)
    assert record.truncated.nonzero().tolist() == [[0, steps - 1], [1, steps - 1]]
    assert record.starts.nonzero().tolist() == [[0, 0], [1, 0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_policies_of_half_precision(dtype):
    env = gymnasium.vector.SyncVectorEnv([lambda: Still(FITTING["normal"][0])] * 4)
    policy = Family(2, FITTING["normal"][1]).to(dtype)
    draws = sf.draw(sf.trajectories.TrajectoryDistribution(env, policy), sf.trajectories.rewards, 4)
    assert draws.x.observations.dtype == draws.x.rewards.dtype == draws.log_prob.dtype == dtype
    assert env.envs[0].action.dtype == np.float32


class Still(gymnasium.Env):
    """Continuous actions; one step."""

    observation_space = gymnasium.spaces.Box(-1.0, 1.0, (3,), np.float32)

    def __init__(self, action_space):
        self.action_space = action_space

    def reset(self, *, seed=None, options=None):
        return np.zeros(3, np.float32), {}

    def step(self, action):
        self.action = action
        return np.zeros(3, np.float32), float(np.sum(action)), True, False, {}


class Family(nn.Module):
    def __init__(self, outputs, make):
        super().__init__()
        self.linear, self.make = nn.Linear(3, outputs), make

    def forward(self, observations):
        return self.make(self.linear(observations))


FITTING = {
    "normal": (
        gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32),
        lambda out: torch.distributions.Independent(torch.distributions.Normal(out, 3.0), 1),
        2,
    ),
    "bernoulli": (gymnasium.spaces.Discrete(2), lambda out: torch.distributions.Bernoulli(logits=out.squeeze(-1)), 1),
    "multidiscrete": (
        gymnasium.spaces.MultiDiscrete([3, 3]),
        lambda out: torch.distributions.Independent(
            torch.distributions.Categorical(logits=out.unflatten(-1, (2, 3))), 1
        ),
        6,
    ),
    "multibinary": (
        gymnasium.spaces.MultiBinary(2),
        lambda out: torch.distributions.Independent(torch.distributions.Bernoulli(logits=out), 1),
        2,
    ),
}


@pytest.mark.parametrize("name", FITTING)
def test_any_distribution_that_fits_the_action_space_will_do(name):
    space, make, outputs = FITTING[name]
    env = gymnasium.vector.SyncVectorEnv([lambda: Still(space)] * 4)
    policy = Family(outputs, make)
    draws = sf.draw(sf.trajectories.TrajectoryDistribution(env, policy), sf.trajectories.rewards, 8)
    assert draws.x.actions.shape == (8, 1, *space.shape)
    assert torch.allclose(draws.fx, draws.x.actions.to(torch.float32).reshape(8, 1, -1).sum(-1))
    wanted = policy(draws.x.observations[:, 0]).log_prob(draws.x.actions[:, 0])
    assert torch.allclose(draws.log_prob, wanted.unsqueeze(-1))
    assert env.envs[0].action.dtype == space.dtype
    sf.surrogate(draws).mean().backward()
    assert policy.linear.weight.grad is not None


@pytest.mark.parametrize(("name", "number"), [("num_samples", 0), ("num_samples", 2.0), ("max_steps", 0)])
def test_numbers_must_be_counts(name, number):
    with pytest.raises(sf.ScorefnError, match=f"{name} must be an integer of at least 1, but it is {number}"):
        rollout(corridors(2), CategoricalPolicy(network()), **{"num_samples": 2, name: number})
