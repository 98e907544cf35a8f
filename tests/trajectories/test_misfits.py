"""Answers of environments that do not fit, and errors in them."""

import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from torch import distributions as td
from torch import nn

import scorefn as sf
from scorefn.trajectories import CategoricalPolicy, RecurrentPolicy, SegmentDistribution, Streams, rewards, rollout
from tests.trajectories.corridor import Corridor, corridors, network
from tests.trajectories.still_environment import Still


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
