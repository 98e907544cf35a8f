"""Actions that the environment does not have: refused in every step, before it sees them, and who made them is said."""

import warnings

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from torch import distributions as td
from torch import nn

import scorefn as sf
from scorefn.trajectories import CategoricalPolicy, Clip, GaussianPolicy, Streams, rewards, rollout
from scorefn.trajectories.actions import ActionGate
from tests.trajectories.still_environment import PLAIN, Family, Still

STEPS = 12


class Watched(Still):
    """Goes on for twelve steps, and remembers each action that it was given."""

    def __init__(self, action_space, observation_space=PLAIN):
        super().__init__(action_space, observation_space)
        self.all_seen = []

    def step(self, action):
        self.all_seen.append(np.array(action))
        observation, reward, _, *rest = super().step(action)
        return observation, reward, self.time == STEPS, *rest


class Native(VectorEnv):
    """Three streams of the same in one environment, without a check of its own."""

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}

    def __init__(self, action_space):
        self.num_envs = 3
        self.single_observation_space, self.single_action_space = PLAIN, action_space
        self.observation_space = gymnasium.vector.utils.batch_space(PLAIN, 3)
        self.action_space = gymnasium.vector.utils.batch_space(action_space, 3)
        self.all_seen = []

    def reset(self, *, seed=None, options=None):
        self.time = 0
        return np.zeros((3, 2), np.float32), {}

    def step(self, actions):
        self.time += 1
        self.all_seen.append(np.array(actions))
        over = np.full(3, self.time == STEPS)
        return np.zeros((3, 2), np.float32), np.ones(3), over, np.zeros(3, bool), {}


def single(space):
    env = Watched(space)
    return env, env


def several(space):
    envs = [Watched(space) for _ in range(3)]
    return SyncVectorEnv([lambda env=env: env for env in envs]), envs[-1]


def native(space):
    env = Native(space)
    return env, env


class Late:
    """Leaves actions as they are, but for those of stream 0 in one step."""

    def __init__(self, step, value):
        self.step, self.value, self.now = step, value, -1

    def __call__(self, actions):
        self.now += 1
        actions = actions.clone()
        if self.now == self.step:
            actions[0] = self.value
        return actions


def family(make, executed):
    policy = Family(make)
    policy.executed = executed
    return policy


def few_counts(h):
    return td.Poisson(torch.full_like(h, 1e-9))


def pairs(h):
    return td.Independent(td.Poisson(torch.full((len(h), 2), 1e-9)), 1)


CASES = {
    "Discrete, above": (spaces.Discrete(31), few_counts, 99.0, r"\[99.0\]", r"clamp\(0, 30\)"),
    "Discrete, below": (spaces.Discrete(31), few_counts, -1.0, r"\[-1.0\]", r"clamp\(0, 30\)"),
    "Discrete, one too many": (spaces.Discrete(31), few_counts, 31.0, r"\[31.0\]", r"clamp\(0, 30\)"),
    "Discrete, between": (spaces.Discrete(31), few_counts, 2.5, r"\[2.5\]", r"clamp\(0, 30\)"),
    "Discrete, NaN": (spaces.Discrete(31), few_counts, float("nan"), r"\[nan\]", r"clamp\(0, 30\)"),
    "MultiDiscrete": (spaces.MultiDiscrete([31, 9]), pairs, 9.0, r"\[\[9.0, 9.0\]\]", "ends of the space"),
    "MultiBinary": (spaces.MultiBinary(2), pairs, 2.0, r"\[\[2.0, 2.0\]\]", r"clamp\(0, 1\)"),
    "Box from 0": (spaces.Box(0, 30, (), np.int64), few_counts, 31.0, r"\[31.0\]", r"clamp\(0, 30\)"),
    "Box from -5": (spaces.Box(-5, 30, (2,), np.int64), pairs, -6.0, r"\[\[-6.0, -6.0\]\]", r"clamp\(-5, 30\)"),
    "Box that would wrap": (spaces.Box(0, 255, (), np.uint8), few_counts, 300.0, r"\[300.0\]", r"clamp\(0, 255\)"),
}


@pytest.mark.parametrize("make", [single, several, native])
@pytest.mark.parametrize("name", CASES)
def test_what_executed_makes_is_looked_at_in_every_step_before_the_environment_sees_it(name, make):
    space, distribution, value, listed, repair = CASES[name]
    env, inner = make(space)
    policy = family(distribution, Late(10, value))
    message = rf"method executed made the actions {listed} for 1 of \d streams in step 10 of the samples .*{repair}"
    with pytest.raises(sf.ScorefnError, match=message):
        rollout(env, policy, 1)
    assert len(inner.all_seen) == 10  # steps 0 to 9
    policy.executed = Late(-2, 0)
    assert rollout(env, policy, 3).mask.all()


def test_the_ends_of_a_space_belong_to_it():
    for space, ends in (
        (spaces.Discrete(31), [0, 30]),
        (spaces.Box(-5, 30, (), np.int64), [-5, 30]),
        (spaces.Box(0, 255, (), np.uint8), [0, 255]),
        (spaces.Box(0, 2**63 - 1, (), np.int64), [0, 2**63 - 1]),
    ):
        env, _ = native(space)
        gate = ActionGate(env, CategoricalPolicy(nn.Linear(2, 2)))
        for end in ends:
            given = torch.full((3,), end)
            assert gate(given, given, 0).tolist() == [end] * 3
            assert gate(given, given, 0).dtype == env.action_space.dtype


def test_each_rollout_and_each_segment_after_the_first_is_looked_at_too():
    env, inner = native(spaces.Discrete(31))
    policy = family(few_counts, Late(STEPS + 20, 99.0))
    streams = Streams(env, policy)
    streams.segment(30)
    before = len(inner.all_seen)
    with pytest.raises(sf.ScorefnError, match=r"executed made the actions \[99.0\] .* in step 2 of"):
        streams.segment(10)
    assert len(inner.all_seen) == before + 2
    assert streams.segment(4).starts[:, 0].all()  # nothing was kept: fresh episodes


def test_an_act_of_its_own_is_looked_at_in_every_step():
    policy = CategoricalPolicy(nn.Linear(2, 4))
    late = Late(7, 5)
    policy.act = lambda observations: late(torch.zeros(len(observations), dtype=torch.int64))
    env, inner = native(spaces.Discrete(4))
    with pytest.raises(
        sf.ScorefnError, match=r"^The policy chose the actions \[5\] for 1 of 3 streams in step 7, .*: act must draw"
    ):
        rollout(env, policy, 3)
    assert len(inner.all_seen) == 7


@pytest.mark.parametrize("changed", ["nothing", "act", "executed", "class"])
def test_only_policies_whose_type_says_what_they_draw_are_spared_later_steps(changed, monkeypatch):
    kind = type("Own", (CategoricalPolicy,), {}) if changed == "class" else CategoricalPolicy
    policy, asked = kind(nn.Linear(2, 4)), []
    if changed == "act":
        policy.act = policy.act
    if changed == "executed":
        policy.executed = lambda actions: actions
    gate = ActionGate.__call__
    monkeypatch.setattr(ActionGate, "__call__", lambda self, *rest: asked.append(rest[-1]) or gate(self, *rest))
    for dtype in (np.int64, np.int32):
        env, inner = native(spaces.Discrete(4, dtype=dtype))
        record = rollout(env, policy, 3)
        assert asked == ([0] if changed == "nothing" else list(range(STEPS)))
        assert np.array_equal(np.stack(inner.all_seen, 1), record.actions)
        assert {array.dtype for array in inner.all_seen} == {env.action_space.dtype}
        asked.clear()


def test_another_shape_in_a_later_step_is_refused():
    late = Late(5, 0.0)

    def executed(actions):
        actions = late(actions)
        return actions.unsqueeze(-1) if late.now == 5 else actions

    with pytest.raises(sf.ShapeError, match=r"method executed acted with shape \(3, 1\), but 3 streams .* need \(3,\)"):
        rollout(native(spaces.Discrete(31))[0], family(few_counts, executed), 3)


def test_at_most_five_actions_are_listed():
    env = SyncVectorEnv([lambda: Watched(spaces.Discrete(31))] * 40)
    policy = family(few_counts, lambda actions: actions * 0 + 99)
    with pytest.raises(sf.ScorefnError) as caught:
        rollout(env, policy, 40)
    assert "the actions [99.0, 99.0, 99.0, 99.0, 99.0, ...] for 40 of 40 streams" in str(caught.value)
    assert len(str(caught.value)) < 500


def test_gradients_and_parameters_stay_as_they_were():
    policy = family(lambda h: td.Poisson(h.exp()), lambda actions: actions * 0 + 99)
    for parameter in policy.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = [parameter.detach().clone() for parameter in policy.parameters()]
    with pytest.raises(sf.ScorefnError, match="executed"):
        sf.expectation(sf.trajectories.TrajectoryDistribution(native(spaces.Discrete(31))[0], policy), rewards, 3)
    for parameter, old in zip(policy.parameters(), before, strict=True):
        assert torch.equal(parameter, old)
        assert torch.equal(parameter.grad, torch.ones_like(parameter))


# ----------------------------------------------------------------------------------------------- samples beyond numbers


def test_a_rate_that_is_infinite_is_named_in_place_of_the_action_that_came_of_it():
    policy = family(lambda h: td.Poisson((0 * h + 1e4).exp()), lambda actions: actions.clamp(max=30).long())
    with pytest.raises(
        sf.NonFiniteError,
        match=r"stream 0 in step 0 is -9.22337e\+18, beyond every integer, so that .* \(a rate\) was not finite or too",
    ):
        rollout(native(spaces.Discrete(31))[0], policy, 3)


def test_samples_that_are_nan_are_blamed_on_the_parameter():
    policy = family(lambda h: td.Poisson(h.exp(), validate_args=False), lambda actions: actions.clamp(max=30).long())
    policy.act = lambda observations: policy.network(observations).squeeze(-1).exp().round()
    with torch.no_grad():
        policy.network.bias.fill_(torch.nan)
    with pytest.raises(sf.NonFiniteError, match=r"stream 0 in step 0 is nan, though .*'network.bias' holds nan"):
        rollout(native(spaces.Discrete(31))[0], policy, 3)


def test_an_observation_that_is_nan_is_blamed_even_if_executed_hides_the_sample():
    class Blind(Native):
        def step(self, actions):
            observation, *rest = super().step(actions)
            return (observation * np.nan if self.time == 4 else observation), *rest

    policy = GaussianPolicy(nn.Linear(2, 1), torch.zeros(1), bounds=Clip([-1.0], [1.0]))
    with pytest.raises(sf.NonFiniteError, match=r"^The observation of stream 0 in step 4 is nan"):
        rollout(Blind(spaces.Box(-1.0, 1.0, (1,), np.float32)), policy, 3)


def test_nan_made_of_a_number_is_refused_in_a_box_of_floats_and_what_leaves_the_box_is_not():
    env, inner = native(spaces.Box(-1.0, 1.0, (1,), np.float32))
    policy = GaussianPolicy(nn.Linear(2, 1), torch.zeros(1))
    policy.executed = Late(6, torch.nan)
    with pytest.raises(
        sf.ScorefnError, match=r"executed made the actions \[\[nan\]\] for 1 of 3 streams in step 6 .*each to a number"
    ):
        rollout(env, policy, 3)
    assert len(inner.all_seen) == 6
    policy.executed = Late(6, 7.0)
    assert rollout(env, policy, 3).mask.all()
    assert inner.all_seen[-STEPS:][6][0] == 7.0


# --------------------------------------------------------------------------------------------- spaces of one's own


def test_a_space_with_a_rule_of_its_own_is_asked():
    class Even(spaces.Discrete):
        def contains(self, x):
            return super().contains(x) and int(x) % 2 == 0

    policy = family(few_counts, Late(10, 3.0))
    with pytest.raises(sf.ScorefnError, match=r"actions \[3.0\] for 1 of 3 streams in step 10"):
        rollout(native(Even(31))[0], policy, 3)


@pytest.mark.parametrize("shape", [(), (2,)])
def test_a_box_of_integers_gives_no_warning(shape):
    env, _ = native(spaces.Box(0, 30, shape, np.int64))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rollout(env, family(pairs if shape else few_counts, Late(-2, 0)), 3)


# ------------------------------------------------------------------------------------------------------------- messages


@pytest.mark.parametrize(
    ("make", "repair"),
    {
        "rate": (lambda h: td.Poisson(h.exp().unsqueeze(-1)), r"\(observations\).squeeze\(-1\), without Independent"),
        "event": (lambda h: td.Independent(td.Poisson(h.exp().unsqueeze(-1)), 1), r"squeeze\(-1\), without Indep"),
        "logits": (lambda h: td.Categorical(logits=h.reshape(-1, 1, 1).expand(-1, 1, 31)), r"squeeze\(-2\)"),
    }.values(),
)
def test_a_forgotten_squeeze_is_named_for_actions_that_are_one_number(make, repair):
    with pytest.raises(sf.ShapeError, match=repair):
        rollout(native(spaces.Discrete(31))[0], family(make, lambda actions: actions.clamp(max=30).long()), 3)


def test_action_dimensions_are_declared_where_an_action_has_some():
    with pytest.raises(sf.ShapeError, match=r"Independent\(distribution, 1\)\.$"):
        rollout(native(spaces.MultiDiscrete([3, 3]))[0], Family(lambda h: td.Poisson(h.exp().expand(2, 3).T)), 3)


def test_counts_in_a_box_of_floats_are_told_of_boxes_of_integers():
    policy = family(few_counts, lambda actions: actions.clamp(max=30))
    with pytest.raises(sf.ScorefnError, match=r"Poisson, which is discrete.*or declare an integer Box or Discrete"):
        rollout(native(spaces.Box(0.0, 30.0, (), np.float32))[0], policy, 3)


def test_streams_without_a_final_observation_are_counted():
    class Silent(Native):
        metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}

    env = Silent(spaces.Discrete(2))
    with pytest.raises(sf.ScorefnError, match=r"no 'final_obs' for streams \[0, 1, 2\] in step 11"):
        rollout(env, CategoricalPolicy(nn.Linear(2, 2)), 3)

    class Many(Still):
        def step(self, action):
            return *super().step(action)[:4], {}

    class Forgets(SyncVectorEnv):
        def step(self, actions):
            return *super().step(actions)[:-1], {}

    env = Forgets([lambda: Many(spaces.Discrete(2))] * 50, autoreset_mode=AutoresetMode.SAME_STEP)
    with pytest.raises(sf.ScorefnError, match=r"for streams \[0, 1, 2, 3, 4, \.\.\.\] \(50 of 50\) in step 2"):
        rollout(env, CategoricalPolicy(nn.Linear(2, 2)), 50)


def test_only_the_dimensions_of_bounds_that_are_wrong_are_listed():
    with pytest.raises(sf.ScorefnError, match=r"low is \[2.0\] and high is \[1.0\] in 1 of 1000\.$"):
        Clip([*[0.0] * 999, 2.0], [1.0] * 1000)
    with pytest.raises(sf.ScorefnError, match=r"\[0.0, 0.0, 0.0, 0.0, 0.0, \.\.\.\] and .* in 1000 of 1000 dimensions"):
        sf.trajectories.Tanh([0.0] * 1000, [torch.inf] * 1000)


@pytest.mark.parametrize("answer", [np.ones(1), "a reward", None], ids=["array", "string", "no tuple"])
@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_a_reward_that_is_no_number_is_named(answer, mode):
    class Pays(Watched):
        def step(self, action):
            observation, _, *rest = super().step(action)
            return None if answer is None else (observation, answer, *rest)

    with pytest.raises((TypeError, ValueError)) as caught:
        rollout(
            SyncVectorEnv([lambda: Pays(spaces.Discrete(2))] * 2, autoreset_mode=mode),
            CategoricalPolicy(nn.Linear(2, 2)),
            2,
        )
    (note,) = caught.value.__notes__
    assert "step 0 of the record, and what stream 0 returned has not the form" in note
    assert "a reward that is one number" in note


def test_a_linear_layer_on_integers_is_told_to_convert_them():
    env = SyncVectorEnv([lambda: Watched(spaces.Discrete(2), spaces.Box(0, 9, (2,), np.int64))] * 2)
    with pytest.raises(RuntimeError, match="dtype") as caught:
        rollout(env, CategoricalPolicy(nn.Linear(2, 2)), 2)
    assert caught.value.__notes__[0].endswith("Integers stay torch.int64, as the space has them: a Linear needs "
                                              "observations.float().")  # fmt: skip


def test_episodes_are_not_enumerated_and_it_is_said_what_to_do():
    policy = CategoricalPolicy(nn.Linear(2, 2))
    days = sf.trajectories.TrajectoryDistribution(native(spaces.Discrete(2))[0], policy, max_steps=1)
    for exact in (
        lambda: sf.diagnostics.exact_gradient(days, rewards, policy.parameters()),
        lambda: sf.diagnostics.exact_expectation(days, rewards),
    ):
        with pytest.raises(sf.ScorefnError, match=r"TrajectoryDistribution cannot be enumerated, .*by hand.*check_unb"):
            exact()
