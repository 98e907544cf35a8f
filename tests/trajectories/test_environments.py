"""Every kind of environment: asynchronous, native, single, EnvPool; every kind of space; and what does not fit."""

import itertools
import warnings

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from torch import nn

import scorefn as sf
from scorefn.core.protocols import tensor_leaves
from scorefn.trajectories import (
    CategoricalPolicy,
    SegmentDistribution,
    Streams,
    TrajectoryDistribution,
    rewards,
    rollout,
)
from tests.trajectories.corridor import MODES, SEQUENCES, Corridor, Scripted, corridors, network


def same(a, b):
    for one, other in zip(*map(tensor_leaves, (a, b)), strict=True):
        assert torch.equal(one, other)


# ------------------------------------------------------------------------------------------------ observation spaces

BOX = spaces.Box(-np.inf, np.inf, (2,), np.float64)
SPACES = {
    "dict": spaces.Dict(position=spaces.Discrete(6), box=BOX, pixels=spaces.Box(0, 255, (2, 3), np.uint8)),
    "tuple": spaces.Tuple((spaces.MultiBinary(3), BOX, spaces.MultiDiscrete([6, 5]))),
    "nested": spaces.Dict(
        b=spaces.Tuple((BOX, spaces.Dict(z=spaces.Discrete(6), a=spaces.Box(-1e9, 1e9, (), np.float32)))), a=BOX
    ),
    "discrete": spaces.Discrete(60, start=-5),
    "multibinary": spaces.MultiBinary((2, 2)),
}


def encoded(name, position, time):
    box = np.array([position, time], dtype=np.float64)
    return {
        "dict": lambda: {
            "pixels": np.full((2, 3), 10 * position, np.uint8),
            "box": box,
            "position": np.int64(position),
        },
        "tuple": lambda: (np.array([position, time, 1]) % 2, box, np.array([position, time])),
        "nested": lambda: {"a": box, "b": (box + 1, {"a": np.array(time + 0.5, np.float32), "z": np.int64(position)})},
        "discrete": lambda: np.int64(6 * time + position - 5),
        "multibinary": lambda: np.array([[position % 2, time % 2], [1, 0]], np.int8),
    }[name]()


class Encoded(Corridor):
    def __init__(self, name):
        super().__init__(poison=False)
        self.name = name
        self.observation_space = SPACES[name]

    def _observation(self):
        return encoded(self.name, self.position, self.time)


def wanted(name, position, time):
    return [torch.as_tensor(np.asarray(leaf)) for leaf in _flat(SPACES[name], encoded(name, position, time))]


def _flat(space, value):
    if isinstance(space, spaces.Dict):
        return [leaf for key in space.spaces for leaf in _flat(space[key], value[key])]
    if isinstance(space, spaces.Tuple):
        return [leaf for part, inner in zip(space.spaces, value, strict=True) for leaf in _flat(part, inner)]
    return [value]


class Reads(Scripted):
    """Its network reads whatever numbers there are."""

    def forward(self, observations):
        total = sum(leaf.double().reshape(len(leaf), -1).sum(-1) for leaf in tensor_leaves(observations))
        return torch.distributions.Categorical(logits=self.network(torch.stack([total, total.square() / 50], -1)))


@pytest.mark.parametrize(
    ("name", "mode", "vector"),
    [
        *itertools.product(SPACES, MODES, [SyncVectorEnv]),
        *itertools.product(["dict", "tuple", "nested"], [AutoresetMode.SAME_STEP], [AsyncVectorEnv]),  # the slower one
    ],
)
def test_observations_of_every_space_are_recorded_as_trees_of_tensors(name, mode, vector):
    count = 16 if vector is SyncVectorEnv else 2
    script = SEQUENCES[[5, 3]] if count == 2 else SEQUENCES
    plain = Streams(corridors(count, mode, poison=False), Scripted(script)).segment(9)
    env = vector([lambda: Encoded(name)] * count, autoreset_mode=mode)
    p = SegmentDistribution(env, Reads(script), 9)
    draws = sf.draw(p, rewards, count)
    env.close()
    record = draws.x
    kinds = {spaces.Dict: dict, spaces.Tuple: tuple}
    assert type(record.observations) is kinds.get(type(SPACES[name]), torch.Tensor)
    if isinstance(record.observations, dict):
        assert set(record.observations) == set(SPACES[name].spaces)
    for ours, theirs in (
        (record.observations, plain.observations),
        (record.next_observations, plain.next_observations),
    ):
        leaves = _flat(SPACES[name], ours)
        for i in range(count):
            for t in range(9):
                if not plain.mask[i, t]:
                    assert not any(leaf[i, t].any() for leaf in leaves)
                    continue
                for leaf, want in zip(leaves, wanted(name, *map(int, theirs[i, t])), strict=True):
                    assert torch.equal(leaf[i, t], want.to(leaf.dtype))
                    assert leaf.dtype == (torch.float64 if want.is_floating_point() else want.dtype) or name == "tuple"
    same(record._replace(observations=(), next_observations=()), plain._replace(observations=(), next_observations=()))
    sf.surrogate(draws, baseline=sf.LeaveOneOut()).mean().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in p.policy.parameters())


def test_whole_episodes_of_structured_observations_are_padded_too():
    env = SyncVectorEnv([lambda: Encoded("nested")] * 3)
    draws = sf.draw(TrajectoryDistribution(env, Reads(SEQUENCES[:3])), rewards, 7)
    assert draws.x.observations["b"][1]["z"].shape == draws.mask.shape
    assert len(draws[draws.mask.all(-1)].x.observations["a"]) == int(draws.mask.all(-1).sum())


def test_a_space_without_tensors_is_refused():
    class Texts(Corridor):
        observation_space = spaces.Dict(a=BOX, b=spaces.Tuple((spaces.Text(5),)))

    with pytest.raises(sf.ScorefnError, match=r"observation space is Dict\(.*Text has none: use Box"):
        Streams(SyncVectorEnv([lambda: Texts()]), CategoricalPolicy(network()))


def test_actions_numbered_from_elsewhere_are_refused():
    class Shifted(Corridor):
        action_space = spaces.MultiDiscrete([2, 2], start=[0, 1])

    with pytest.raises(sf.ScorefnError, match="does not start at 0.*TransformAction"):
        Streams(Shifted(), CategoricalPolicy(network()))


# ------------------------------------------------------------------------------------------------ kinds of environment


@pytest.mark.parametrize("mode", MODES)
def test_asynchronous_streams_are_the_same_streams(mode):
    script = SEQUENCES[[5, 3, 11]]
    envs = [lambda: Corridor(False)] * 3
    asynchronous = AsyncVectorEnv(envs, autoreset_mode=mode)
    same(
        Streams(SyncVectorEnv(envs, autoreset_mode=mode), Scripted(script)).segment(11),
        Streams(asynchronous, Scripted(script)).segment(11),
    )
    asynchronous.close()


def test_a_single_environment_is_one_stream():
    script = SEQUENCES[[5]]
    record = rollout(Corridor(), Scripted(script), 3)
    assert record.mask.shape == (3, 4)
    same(record, rollout(corridors(1), Scripted(script), 3))
    env = Corridor(False)
    same(
        Streams(env, Scripted(script)).segment(9),
        Streams(corridors(1, AutoresetMode.SAME_STEP, poison=False), Scripted(script)).segment(9),
    )
    policy = CategoricalPolicy(network())
    sf.expectation(TrajectoryDistribution(env, policy), rewards, 5).backward()


def test_a_wrapped_single_environment_is_taken_with_its_wrappers():
    env = gymnasium.make("CartPole-v1", max_episode_steps=7)
    record = rollout(env, CategoricalPolicy(nn.Linear(4, 2)), 4)
    assert record.mask.shape[1] <= 7
    assert record.done.sum() == 4


def test_native_streams_are_masked_where_they_are_reset():
    env = gymnasium.make_vec("CartPole-v1", num_envs=3, vectorization_mode="vector_entry_point")
    torch.manual_seed(0)
    record = Streams(env, CategoricalPolicy(nn.Linear(4, 2))).segment(100)
    assert (~record.mask).sum() == record.done[:, :-1].sum()
    assert torch.equal(~record.mask[:, 1:], record.done[:, :-1])
    assert torch.equal(record.starts[:, 2:], record.done[:, :-2])
    inside = record.mask[:, :-1] & ~record.done[:, :-1]
    assert torch.equal(record.next_observations[:, :-1][inside], record.observations[:, 1:][inside])
    low = record.next_observations[record.terminated]
    assert ((low[:, 0].abs() > 2.4) | (low[:, 2].abs() > 12 * np.pi / 180)).all()  # not what came after the reset
    assert (record.rewards == record.mask).all()


def test_discrete_observations_of_a_toy_text():
    for mode in MODES:
        env = gymnasium.make_vec(
            "FrozenLake-v1", num_envs=3, vectorization_mode="sync", vector_kwargs={"autoreset_mode": mode}
        )
        torch.manual_seed(0)
        record = Streams(env, CategoricalPolicy(nn.Embedding(16, 4))).segment(60)
        final = record.next_observations[record.terminated]
        assert len(final) > 5
        assert set(final.tolist()) <= {5, 7, 11, 12, 15}  # the holes and the goal
        assert (record.observations[record.starts] == 0).all()


def envpool_cartpole(count=3, **settings):
    envpool = pytest.importorskip("envpool")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Gymnasium, about the precision of EnvPool's bounds
        env = envpool.make("CartPole-v1", env_type="gymnasium", num_envs=count, seed=3, **settings)
        assert env.single_observation_space.shape == (4,)
        return env


def test_envpool_is_a_vector_environment_whose_seed_is_its_own():
    records = []
    for _ in range(2):
        env = envpool_cartpole()
        torch.manual_seed(0)
        policy = CategoricalPolicy(nn.Linear(4, 2))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            episodes = rollout(env, policy, 5)
            records.append(Streams(env, policy).segment(60))
        assert episodes.terminated.sum() == 5
        assert torch.equal(records[-1].starts[:, 2:], records[-1].done[:, :-2])
        assert torch.equal(~records[-1].mask[:, 1:], records[-1].done[:, :-1])
        sf.expectation(SegmentDistribution(env, policy, 20), rewards, 3).backward()
    same(*records)


def test_envpool_in_turns_is_refused():
    """With a batch smaller than the pool a step answers for some of the streams only."""
    env = envpool_cartpole(batch_size=2)
    with pytest.raises(sf.ScorefnError, match="3 streams"):
        Streams(env, CategoricalPolicy(nn.Linear(4, 2))).segment(3)


# ---------------------------------------------------------------------------------------------------- what does not fit


class Declared(gymnasium.vector.VectorWrapper):
    """Says of itself what is not so."""

    def __init__(self, env, mode):
        super().__init__(env)
        self._metadata = {**env.metadata, "autoreset_mode": mode}


@pytest.mark.parametrize("mode", [None, "never"])
def test_an_environment_must_say_how_it_resets(mode):
    with pytest.raises(sf.ScorefnError, match=r"\['autoreset_mode'\] is .*, but it decides which row"):
        rollout(Declared(corridors(2), mode), CategoricalPolicy(network()), 2)


def test_the_declaration_may_be_a_word():
    same(
        rollout(Declared(corridors(2), "NextStep"), Scripted(SEQUENCES[:2]), 2),
        rollout(corridors(2), Scripted(SEQUENCES[:2]), 2),
    )


def test_an_environment_that_ignores_reset_mask_is_refused():
    env = gymnasium.make_vec("CartPole-v1", num_envs=3, vectorization_mode="vector_entry_point")
    torch.manual_seed(0)
    with pytest.raises(sf.ScorefnError, match=r"declares autoreset mode DISABLED, but it also reset streams"):
        Streams(Declared(env, AutoresetMode.DISABLED), CategoricalPolicy(nn.Linear(4, 2))).segment(60)


def test_an_environment_that_keeps_the_final_observation_to_itself_is_refused():
    class Silent(gymnasium.vector.VectorWrapper):
        def step(self, actions):
            *rest, _ = super().step(actions)
            return *rest, {}

    env = Silent(corridors(2, AutoresetMode.SAME_STEP))
    with pytest.raises(sf.ScorefnError, match=r"no 'final_obs' for streams \[0\] in step 1"):
        rollout(env, Scripted(torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]])), 2)


def test_a_reset_of_another_shape_is_refused():
    class Thin(gymnasium.vector.VectorWrapper):
        def reset(self, **options):
            observation, info = super().reset(**options)
            return observation[:, :1], info

    with pytest.raises(sf.ShapeError, match=r"observations of shape \(2, 1\), but 2 streams of Box.* need \(2, 2\)"):
        rollout(Thin(corridors(2)), CategoricalPolicy(network()), 2)


# -------------------------------------------------------------------------------------------------- executed actions


class Heard(gymnasium.Env):
    """Writes down what it is given; three steps."""

    observation_space = spaces.Box(-1.0, 1.0, (1,), np.float64)
    action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)

    def __init__(self):
        self.heard = []

    def reset(self, *, seed=None, options=None):
        return np.zeros(1), {}

    def step(self, action):
        self.heard.append(action)
        return np.zeros(1), 1.0, False, len(self.heard) == 3, {}


class Wide(nn.Module):
    def __init__(self, function=None):
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        if function is not None:
            self.executed = function

    def forward(self, observations):
        normal = torch.distributions.Normal(self.mean.expand(*observations.shape[:-1], 2), 5.0)
        return torch.distributions.Independent(normal, 1)


@pytest.mark.parametrize("function", [None, lambda action: action.clamp(-1, 1), torch.tanh])
def test_what_was_sampled_is_recorded_and_scored_and_what_is_executed_is_done(function):
    env = Heard()
    policy = Wide(function)
    torch.manual_seed(0)
    draws = sf.draw(TrajectoryDistribution(env, policy), rewards, 1)
    assert (draws.x.actions.abs() > 1).any()
    done = draws.x.actions if function is None else function(draws.x.actions)
    assert np.array_equal(np.stack(env.heard), done[0].float().numpy())
    assert env.heard[0].dtype == np.float32
    wanted = torch.distributions.Normal(policy.mean, 5.0).log_prob(draws.x.actions).sum(-1)
    assert torch.allclose(draws.log_prob, wanted)


def test_executed_actions_must_have_the_shape_of_the_space():
    with pytest.raises(sf.ShapeError, match=r"acted with shape \(1, 1\), but 1 streams .* need \(1, 2\)"):
        rollout(Heard(), Wide(lambda action: action[..., :1]), 1)
