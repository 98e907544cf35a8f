"""Segments: rows, flags and resets by hand in every autoreset mode, exact gradients, and what goes on between them."""

import itertools

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from torch import nn

import scorefn as sf
from scorefn.core.protocols import tensor_leaves
from scorefn.trajectories import CategoricalPolicy, SegmentDistribution, Streams, returns, rewards
from tests.trajectories.corridor import MODES, START, Corridor, Scripted, corridors, move, network, segment

NEXT_STEP = AutoresetMode.NEXT_STEP
ROWS = 7
SCRIPTS = torch.tensor(list(itertools.product([0, 1], repeat=ROWS)))  # [128, 7]


def same(a, b):
    for one, other in zip(*map(tensor_leaves, (a, b)), strict=True):
        assert torch.equal(one, other)


def joined(parts):
    return [torch.cat(column, 1) for column in zip(*map(tensor_leaves, parts), strict=True)]


@pytest.mark.parametrize("mode", MODES)
def test_every_row_is_as_by_hand(mode):
    record = Streams(corridors(len(SCRIPTS), mode, poison=False), Scripted(SCRIPTS)).segment(ROWS)
    assert record.state is None
    assert torch.equal(record.done, record.terminated | record.truncated)
    seen = set()
    for i, actions in enumerate(SCRIPTS.tolist()):
        for t, row in enumerate(segment(actions, mode)):
            leaves = [leaf[i, t] for leaf in tensor_leaves(record)]
            if row is None:
                assert not any(leaf.any() for leaf in leaves)
                continue
            position, time, action, reward, terminated, truncated, after, later, start = row
            seen.add((terminated, truncated, start))
            assert record.mask[i, t]
            assert record.observations[i, t].tolist() == [position, time]
            assert record.actions[i, t] == action
            assert record.rewards[i, t] == reward
            assert record.terminated[i, t] == terminated
            assert record.truncated[i, t] == truncated
            assert record.next_observations[i, t].tolist() == [after, later]
            assert record.starts[i, t] == start
    assert len(seen) == 5  # all but an episode of one step that ends
    assert record.mask.all() == (mode is not NEXT_STEP)


@pytest.mark.parametrize("mode", MODES)
def test_segments_put_together_are_one_long_segment(mode):
    script = torch.randint(2, (5, 40), generator=torch.Generator().manual_seed(0))
    whole = Streams(corridors(5, mode, poison=False), Scripted(script)).segment(40)
    streams = Streams(corridors(5, mode, poison=False), Scripted(script))
    parts = [streams.segment(steps) for steps in (1, 7, 2, 1, 1, 20, 8)]
    for one, other in zip(tensor_leaves(whole), joined(parts), strict=True):
        assert torch.equal(one, other)
    assert whole.starts.sum() > 40


def test_memory_that_the_environment_writes_to_again_is_copied():
    script = torch.randint(2, (3, 30), generator=torch.Generator().manual_seed(0))
    for mode in MODES:
        records = []
        for copy in (True, False):
            env = gymnasium.vector.SyncVectorEnv([lambda: Corridor(False)] * 3, copy=copy, autoreset_mode=mode)
            streams = Streams(env, Scripted(script))
            records.append(joined([streams.segment(10), streams.segment(20)]))
        assert all(map(torch.equal, *records))


class Alternating(CategoricalPolicy):
    """Acts by what it sees, differently in each stream; every episode has four steps."""

    def act(self, observations):
        stream = torch.arange(len(observations))
        return ((observations[:, 1] + stream) % 2 == 0).long()


def gradients(draws, policy, **parts):
    estimate = sf.surrogate(draws, **parts).mean()
    return torch.autograd.grad(estimate, list(policy.parameters()), retain_graph=True)


REDUCERS = {
    "plain": {},
    "leave-one-out": {"baseline": sf.LeaveOneOut()},
    "total": {"credit": sf.Total(), "baseline": sf.LeaveOneOut()},
    "discounted": {"credit": sf.RewardToGo(0.5)},
    "usual": {"credit": sf.RewardToGo(0.5, visitation_discount=False), "baseline": sf.Constant(0.25)},
}


@pytest.mark.parametrize("name", REDUCERS)
@pytest.mark.parametrize("mode", MODES[1:])
def test_every_autoreset_mode_gives_the_same_gradient(mode, name):
    """Twelve steps are three episodes of four, and with NEXT_STEP two rows more; the same bits."""
    results = []
    for each, rows in ((NEXT_STEP, 14), (mode, 12)):
        policy = Alternating(network())
        p = SegmentDistribution(corridors(5, each, poison=False), policy, rows)
        for _ in range(2):  # also where a segment begins with a row that is used up
            draws = sf.draw(p, rewards, 5)
            results.append(gradients(draws, policy, **REDUCERS[name]))
            if each is NEXT_STEP:
                p.streams.segment(1)
    first, second = results[:2], results[2:]
    for ours, other in zip(first, second, strict=True):
        assert all(map(torch.equal, ours, other))
        assert all(g.abs().sum() > 0 for g in ours)


def expected_segment(logits, rows, mode, position=START, time=0, start=START):
    """Expected sum of the rewards of so many rows, by recursion."""
    if rows <= 0:
        return 0.0
    probability = logits(position, time).softmax(-1)
    total = 0.0
    for action in (0, 1):
        following, reward, terminated, truncated = move(position, time, action)
        if terminated or truncated:
            other = 5 - start
            rest = expected_segment(logits, rows - 1 - (mode is NEXT_STEP), mode, other, 0, other)
        else:
            rest = expected_segment(logits, rows - 1, mode, following, time + 1, start)
        total = total + probability[action] * (reward + rest)
    return total


@pytest.mark.parametrize("f", [rewards, lambda record: record.rewards.sum(-1)])
@pytest.mark.parametrize("mode", MODES)
def test_the_expected_gradient_is_exact(mode, f):
    """Summed over all 128 scripts: rewards of later episodes are not charged to earlier ones, and nothing is lost.

    What an action does to how many steps of the next episode still fit is charged to it by the whole segment's value
    only; with one value a step it is left out, by construction: the credit ends with the episode.
    """
    policy = Scripted(SCRIPTS)
    draws = sf.draw(SegmentDistribution(corridors(128, mode, poison=False), policy, ROWS), f, 128)
    probability = draws.log_prob.detach().sum(-1).exp() * 0.5 ** (~draws.mask).sum(-1)
    assert abs(probability.sum().item() - 1) < 1e-12

    def logits(position, time):
        return policy.network(torch.tensor([position, time], dtype=torch.float64))

    exact = expected_segment(logits, ROWS, mode)
    value = probability @ sf.surrogate(draws)
    assert abs((value - exact).item()) < 1e-12
    whole = sf.surrogate(draws, credit=sf.Total()) if f is rewards else sf.surrogate(draws)
    ours, wanted = (torch.autograd.grad(v, list(policy.parameters())) for v in (probability @ whole, exact))
    assert all((a - b).abs().max() < 1e-12 for a, b in zip(ours, wanted, strict=True))


def test_the_credit_of_a_step_ends_with_its_episode():
    for mode in MODES:
        draws = sf.draw(SegmentDistribution(corridors(128, mode, poison=False), Scripted(SCRIPTS), ROWS), rewards, 128)
        signal = draws.signal()
        for i, actions in enumerate(SCRIPTS.tolist()):
            rows = segment(actions, mode)
            for t, row in enumerate(rows):
                if row is not None:
                    end = next((s for s in range(t, ROWS) if rows[s] is None or rows[s][4] or rows[s][5]), ROWS - 1)
                    assert signal[i, t] == sum(r[3] for r in rows[t : end + 1])


def test_leave_one_out_averages_the_streams_that_have_the_step():
    script = SCRIPTS[[5, 0, 77, 127, 3]]
    draws = sf.draw(SegmentDistribution(corridors(5, NEXT_STEP, poison=False), Scripted(script), ROWS), rewards, 5)
    baseline = sf.LeaveOneOut()(draws.signal(), draws)
    holes = 0
    for t in range(ROWS):
        for i in range(5):
            others = [draws.signal()[j, t].item() for j in range(5) if j != i and draws.mask[j, t]]
            holes += 4 - len(others)
            if draws.mask[i, t]:
                assert abs(baseline[i, t].item() - sum(others) / len(others)) < 1e-12
    assert holes > 4


# ------------------------------------------------------------------------------------------------- between segments


def test_num_samples_is_the_number_of_streams():
    p = SegmentDistribution(corridors(3, poison=False), CategoricalPolicy(network()), 4)
    assert p.streams.num_envs == 3
    with pytest.raises(sf.ScorefnError, match=r"num_samples is 4, but the environment has 3 streams.*num_samples=3"):
        sf.draw(p, rewards, 4)
    with pytest.raises(sf.ScorefnError, match="coupling=.*leave coupling out"):
        sf.draw(p, rewards, 3, coupling=sf.Antithetic())
    with pytest.raises(sf.ScorefnError, match="steps must be an integer of at least 1, but it is 0"):
        SegmentDistribution(corridors(3), CategoricalPolicy(network()), 0)
    assert len(sf.draw(p, rewards, 3, coupling=sf.Independent())) == 3


def test_returns_of_whole_episodes_are_refused_where_episodes_are_not_whole():
    p = SegmentDistribution(corridors(2, poison=False), Scripted(torch.tensor([[1, 0, 1, 0], [1, 0, 1, 0]])), 3)
    with pytest.raises(sf.ScorefnError, match=r"Stream 0 of 2 has not ended its episode after step 2, the last one"):
        sf.draw(p, returns, 2)
    with pytest.raises(sf.ScorefnError, match="Stream 0 of 2 is in the middle of an episode at step 0"):
        sf.draw(p, returns, 2)
    env = corridors(2, AutoresetMode.SAME_STEP, poison=False)
    p = SegmentDistribution(env, Scripted(torch.tensor([[1, 0, 1, 0], [0, 1, 0, 1]])), 8)
    with pytest.raises(sf.ScorefnError, match="Stream 0 of 2 begins another episode within the record"):
        sf.draw(p, returns, 2)
    whole = SegmentDistribution(corridors(2, poison=False), Scripted(torch.tensor([[1, 0, 1, 0], [1, 1, 1, 0]])), 4)
    draws = sf.draw(whole, returns, 2)  # one stream is over after three steps, one after four: both are whole
    assert torch.equal(draws.fx.squeeze(-1), draws.x.rewards.sum(-1))
    assert draws.mask.tolist() == [[True] * 4, [True] * 3 + [False]]


class Failing(Corridor):
    """Does something else in a step, counted over all episodes."""

    def __init__(self, at, what):
        super().__init__(poison=False)
        self.at, self.what, self.steps = at, what, 0

    def step(self, action):
        self.steps += 1
        answer = list(super().step(action))
        if self.steps - 1 == self.at:
            if isinstance(self.what, type):
                raise self.what("the robot fell over")
            answer[self.what[0]] = self.what[1]
        return tuple(answer)


def failing(at, what, mode=AutoresetMode.SAME_STEP):
    envs = [lambda: Corridor(False), lambda: Failing(at, what), lambda: Corridor(False)]
    return gymnasium.vector.SyncVectorEnv(envs, autoreset_mode=mode)


NAN = np.array([np.nan, 1.0])


@pytest.mark.parametrize(
    ("at", "what", "error", "message"),
    [
        (5, (1, np.nan), sf.NonFiniteError, "The reward of stream 1 in step 5 is nan"),
        (6, (1, -np.inf), sf.NonFiniteError, "The reward of stream 1 in step 6 is -inf"),
        (4, (0, NAN), sf.NonFiniteError, "The observation of stream 1 in step 5 is nan"),
        (3, (0, NAN), sf.NonFiniteError, "The next observation of stream 1 in step 3 is nan"),  # the end of an episode
        (9, (0, NAN), sf.NonFiniteError, "The next observation of stream 1 in step 9 is nan"),  # that of the segment
        (5, RuntimeError, RuntimeError, "the robot fell over"),
        (5, KeyboardInterrupt, KeyboardInterrupt, "the robot fell over"),
    ],
)
@pytest.mark.parametrize("mode", MODES[1:])
def test_a_failing_environment_is_named_and_the_streams_stay_usable(mode, at, what, error, message):
    policy = Alternating(network())
    p = SegmentDistribution(failing(at, what, mode), policy, 10)
    baseline = sf.MovingAverage()
    with pytest.raises(error, match=message) as caught:
        sf.expectation(p, rewards, 3, baseline=baseline)
    assert baseline.mean is None
    if error is RuntimeError:
        assert "step 5 of the record, and stream 1 raised" in caught.value.__notes__[0]
    after = sf.draw(p, rewards, 3).x
    assert after.starts[:, 0].all()  # fresh episodes
    same(after, Streams(corridors(3, mode, poison=False), policy).segment(10))


@pytest.mark.parametrize("what", [(1, np.nan), RuntimeError, KeyboardInterrupt])
def test_streams_that_were_going_on_begin_afresh_after_a_failure(what):
    policy = Alternating(network())
    streams = Streams(failing(13, what), policy)
    first = streams.segment(10)
    with pytest.raises(sf.NonFiniteError if isinstance(what, tuple) else what):
        streams.segment(10)
    same(first, streams.segment(10))


def test_a_policy_that_refuses_what_is_not_finite_does_not_hide_where_it_came_from():
    class Strict(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network()

        def forward(self, observations):
            return torch.distributions.Categorical(logits=self.network(observations), validate_args=True)

    streams = Streams(failing(1, (0, NAN)), Strict())
    with pytest.raises(sf.NonFiniteError, match="The observation of stream 1 in step 2 is nan") as caught:
        streams.segment(4)
    assert isinstance(caught.value.__cause__, ValueError)


def test_rewards_of_another_shape_are_refused():
    class Column(gymnasium.vector.VectorWrapper):
        def step(self, actions):
            observation, reward, *rest = super().step(actions)
            return observation, reward[:, None], *rest

    with pytest.raises(sf.ShapeError, match=r"rewards of shape \(3, 1\) in step 0, but 3 streams need \(3,\)"):
        Streams(Column(corridors(3)), CategoricalPolicy(network())).segment(2)


def test_streams_can_be_told_to_begin_afresh():
    streams = Streams(corridors(2, poison=False), Alternating(network()))
    first = streams.segment(3)
    assert not streams.segment(3).starts[:, 0].any()
    streams.reset()
    same(first, streams.segment(3))
