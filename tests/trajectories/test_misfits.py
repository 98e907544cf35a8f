"""What environments and policies answer that does not fit: refused by name, before anything is kept or learned."""

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from torch import distributions as td
from torch import nn

import scorefn as sf
from scorefn.trajectories import (
    CategoricalPolicy,
    Clip,
    GaussianPolicy,
    MultiCategoricalPolicy,
    RecurrentPolicy,
    SegmentDistribution,
    Streams,
    TrajectoryDistribution,
    rewards,
    rollout,
)
from tests.trajectories.corridor import MODES, Corridor, corridors, network

PLAIN = spaces.Box(-1.0, 1.0, (2,), np.float32)


class Still(gymnasium.Env):
    """Nothing happens for three steps, in any spaces."""

    def __init__(self, action_space, observation_space=PLAIN, value=1):
        self.action_space, self.observation_space, self.value = action_space, observation_space, value

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return np.full(self.observation_space.shape, self.value, self.observation_space.dtype), {}

    def step(self, action):
        self.time += 1
        self.seen = action
        observation = np.full(self.observation_space.shape, self.value, self.observation_space.dtype)
        return observation, 1.0, self.time == 3, False, {}


def still(action_space, observation_space=PLAIN, value=1, count=3):
    return SyncVectorEnv([lambda: Still(action_space, observation_space, value)] * count)


class Family(nn.Module):
    """A policy of any distribution, made from one output of a network."""

    def __init__(self, make):
        super().__init__()
        self.make, self.network = make, nn.Linear(2, 1)

    def forward(self, observations):
        return self.make(self.network(observations.float()).squeeze(-1))


class Rounding(GaussianPolicy):
    def executed(self, actions):
        return actions.round().clamp(0, 10).long()


# -------------------------------------------------------------------------------------------------------------- shapes


class Answers(SyncVectorEnv):
    """Changes one of the five parts of what a step returns."""

    def __init__(self, part, change, kind=Corridor):
        super().__init__([lambda: kind(poison=False)] * 3)
        self.part, self.change = part, change

    def step(self, actions):
        answer = list(super().step(actions))
        answer[self.part] = self.change(answer[self.part])
        return tuple(answer)


CUTS = {
    "one stream": lambda a: a[:1],
    "no axis of streams": lambda a: a[0],
    "an axis too many": lambda a: a[..., None],
}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize(("part", "noun"), [(0, "observations"), (1, "rewards"), (2, "flags"), (3, "flags")])
def test_what_a_step_returns_is_never_broadcast(part, noun, cut):
    env = Answers(part, CUTS[cut])
    for go in (lambda p: rollout(env, p, 3), lambda p: Streams(env, p).segment(9)):
        with pytest.raises(sf.ShapeError, match=rf"returned {noun}.* of shape \(.*\) in step 0.*never repaired"):
            go(CategoricalPolicy(network()))


def test_flags_that_are_no_bools_are_refused_and_lists_are_not_taken_for_arrays():
    for change, found in ((lambda a: a.astype(int), "ndarray of int64"), (lambda a: a.tolist(), "list of no dtype")):
        with pytest.raises(sf.ScorefnError, match=rf"{found} in step 0.*np.asarray\(flags, dtype=bool\)"):
            rollout(Answers(2, change), CategoricalPolicy(network()), 3)


class Pairs(Corridor):
    observation_space = spaces.Dict(a=Corridor.observation_space, b=Corridor.observation_space)

    def _observation(self):
        return {"a": super()._observation(), "b": super()._observation()}


class ReadsA(nn.Module):
    def __init__(self):
        super().__init__()
        self.network = network()

    def forward(self, observations):
        return td.Categorical(logits=self.network(observations["a"]))


def test_leaves_of_structured_observations_are_not_broadcast_either():
    assert Streams(Answers(0, lambda o: o, kind=Pairs), ReadsA()).segment(4).mask.any()
    env = Answers(0, lambda o: {"a": o["a"], "b": o["b"][:1]}, kind=Pairs)
    with pytest.raises(sf.ShapeError, match=r"env.step returned observations of shape \(1, 2\) in step 0.*\(3, 2\)"):
        Streams(env, ReadsA()).segment(4)


def test_rewards_and_observations_may_be_lists():
    plain = Streams(Answers(0, lambda o: o, kind=Corridor), CategoricalPolicy(network()))
    for part in (0, 1):
        lists = Streams(Answers(part, lambda a: a.tolist(), kind=Corridor), CategoricalPolicy(network()))
        records = []
        for streams in (plain, lists):
            streams.reset()
            torch.manual_seed(0)
            records.append(streams.segment(6))
        for ours, theirs in zip(*records, strict=True):
            assert ours is theirs is None or torch.equal(ours, theirs)


def test_what_fails_after_the_loop_over_streams_names_none_of_them():
    class Odd(Corridor):
        def _observation(self):
            observation = super()._observation()
            return observation[:1] if self.time == 1 else observation

    env = SyncVectorEnv([lambda: Odd(poison=False)] * 3)
    with pytest.raises(ValueError, match="shape") as caught:
        rollout(env, CategoricalPolicy(network()), 3)
    assert "env.step in step 0 of the record; nothing was kept" in " ".join(caught.value.__notes__)


def test_a_masked_reset_is_not_broadcast():
    class Cut(SyncVectorEnv):
        def reset(self, *, seed=None, options=None):
            masked = bool(options)
            observation, info = super().reset(seed=seed, options=options)
            return (observation[:1] if masked else observation), info

    env = Cut([lambda: Corridor(poison=False)] * 3, autoreset_mode=AutoresetMode.DISABLED)
    with pytest.raises(sf.ShapeError, match=r"reset_mask'\] returned observations of shape \(1, 2\) in step \d"):
        Streams(env, CategoricalPolicy(network())).segment(9)


def test_final_observations_are_not_broadcast():
    class Cut(SyncVectorEnv):
        def step(self, actions):
            *rest, info = super().step(actions)
            for i in np.flatnonzero(info.get("_final_obs", [])):
                info["final_obs"][i] = info["final_obs"][i][:1]
            return *rest, info

    env = Cut([lambda: Corridor(poison=False)] * 3, autoreset_mode=AutoresetMode.SAME_STEP)
    with pytest.raises(sf.ShapeError, match=r"final_obs'\] of stream \d in step \d has shape \(1,\).*needs \(2,\)"):
        Streams(env, CategoricalPolicy(network())).segment(9)


# -------------------------------------------------------------------------------------------------------------- spaces

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


# ------------------------------------------------------------------------------------------------------------- resets


def test_a_segment_without_any_step_is_empty_for_policies_with_a_memory_too():
    env = SyncVectorEnv([lambda: Still(spaces.Discrete(2))] * 3)
    for policy in (
        CategoricalPolicy(nn.Linear(2, 2)),
        RecurrentPolicy(nn.GRUCell(2, 4), CategoricalPolicy(nn.Linear(4, 2))),
    ):
        p = SegmentDistribution(env, policy, 1)
        present = []
        for _ in range(6):
            draws = sf.draw(p, rewards, 3)
            present.append(bool(draws.mask.any()))
            sf.surrogate(draws, baseline=sf.LeaveOneOut()).mean().backward()
            if not present[-1]:
                assert torch.equal(draws.log_prob, torch.zeros(3, 1))
        assert present == [True, True, True, False, True, True]
        assert all(bool(torch.isfinite(q.grad).all()) for q in policy.parameters())


@pytest.mark.parametrize("declared", [AutoresetMode.NEXT_STEP, AutoresetMode.DISABLED])
def test_a_reset_within_the_step_that_is_not_declared_is_refused(declared):
    env = corridors(3, AutoresetMode.SAME_STEP, poison=False)
    env.metadata = {**env.metadata, "autoreset_mode": declared}
    with pytest.raises(sf.ScorefnError, match=rf"declares autoreset mode {declared.name}, but .*final_obs.*SAME_STEP"):
        Streams(env, CategoricalPolicy(network())).segment(9)


class Fails(Corridor):
    """The second of three raises, in its second step or its second reset."""

    def __init__(self, where, stream):
        super().__init__(poison=False)
        self.where, self.stream, self.resets = where, stream, 0

    def reset(self, **arguments):
        self.resets += 1
        if self.where == "reset" and self.stream == 1 and self.resets == 2:
            raise RuntimeError("boom")
        return super().reset(**arguments)

    def step(self, action):
        if self.where == "step" and self.stream == 1 and self.time == 1:
            raise RuntimeError("boom")
        return super().step(action)


def failing(vector, where, mode):
    return vector([lambda i=i: Fails(where, i) for i in range(3)], autoreset_mode=mode)


def notes(env):
    with pytest.raises(RuntimeError, match="boom") as caught:
        Streams(env, CategoricalPolicy(network())).segment(20)
    return " ".join(caught.value.__notes__)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("where", ["step", "reset"])
@pytest.mark.parametrize("vector", [SyncVectorEnv, AsyncVectorEnv])
def test_an_error_in_a_stream_names_the_stream(vector, where):
    env = failing(vector, where, AutoresetMode.SAME_STEP)
    note = notes(env)
    assert "env.step in step" in note
    assert "stream 1 raised" in note
    env.close(**({"terminate": True} if vector is AsyncVectorEnv else {}))


def test_an_error_in_a_masked_reset_says_so():
    note = notes(failing(SyncVectorEnv, "reset", AutoresetMode.DISABLED))
    assert "env.reset with reset_mask for streams [" in note
    assert "stream 1 raised" in note


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
