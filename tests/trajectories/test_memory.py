"""Recurrent policies in streams: states carried over segments, reset per stream where an episode starts, and scored."""

import gymnasium
import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import scorefn as sf
from scorefn.core.protocols import tensor_leaves
from scorefn.trajectories import (
    CategoricalPolicy,
    RecurrentPolicy,
    SegmentDistribution,
    Streams,
    TrajectoryDistribution,
    rewards,
    rollout,
)
from tests.trajectories.corridor import MODES, corridors


class Sum(nn.Module):
    """Its state is what it saw since the episode's start, and a learned beginning."""

    def __init__(self):
        super().__init__()
        self.first = nn.Parameter(torch.tensor([0.5, -0.25], dtype=torch.float64))

    def initial_state(self, num_streams):
        return self.first.expand(num_streams, 2)

    def forward(self, features, state):
        return state + features


def remembering(seed=0):
    torch.manual_seed(seed)
    return RecurrentPolicy(Sum(), CategoricalPolicy(nn.Linear(2, 2).double()))


class Slow(nn.Module):
    """A recurrent policy without ``act``, of two states in a dict."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.linear = nn.Linear(3, 2).double()

    def initial_state(self, num_streams):
        zeros = torch.zeros(num_streams, dtype=torch.float64)
        return {"sum": zeros, "count": zeros.long()}

    def forward(self, observations, state):
        state = {"sum": state["sum"] + observations[:, 0], "count": state["count"] + 1}
        seen = torch.stack([state["sum"], state["count"].double(), observations[:, 1]], -1)
        return torch.distributions.Categorical(logits=self.linear(seen)), state

    def unrolled(self, observations, starts, state):
        logits = []
        for t in range(starts.shape[1]):
            fresh = self.initial_state(len(starts))
            state = pytree.tree_map(lambda old, new, t=t: torch.where(starts[:, t], new, old), state, fresh)
            distribution, state = self(observations[:, t], state)
            logits.append(distribution.logits)
        return torch.distributions.Categorical(logits=torch.stack(logits, 1))


def by_hand(policy, record, state):
    """The log-probability of each step and the state after the last one, stream by stream."""
    log_prob = torch.zeros(record.mask.shape, dtype=torch.float64)
    rows = []
    for i in range(len(record.mask)):
        memory = state[i]
        for t in record.mask[i].nonzero().flatten().tolist():
            memory = (policy.core.first.detach() if record.starts[i, t] else memory) + record.observations[i, t]
            log_prob[i, t] = policy.head(memory).log_prob(record.actions[i, t]).detach()
        rows.append(memory)
    return log_prob, torch.stack(rows)


@pytest.mark.parametrize("mode", MODES)
def test_states_are_carried_and_reset_as_by_hand(mode):
    policy = remembering()
    p = SegmentDistribution(corridors(5, mode, poison=False), policy, 6)
    torch.manual_seed(2)
    state = policy.initial_state(5).detach()
    carried = 0
    for _ in range(12):
        draws = sf.draw(p, rewards, 5)
        if not draws.x.starts[:, 0].all():
            going_on = draws.mask[:, 0] & ~draws.x.starts[:, 0]
            carried += int(going_on.sum())
            assert torch.equal(draws.x.state[going_on], state[going_on])
        log_prob, state = by_hand(policy, draws.x, draws.x.state)
        assert (log_prob - draws.log_prob).abs().max() < 1e-12
    assert carried > 10


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("make", [remembering, Slow])
def test_segments_put_together_are_one_long_segment(mode, make):
    policy, records = make(), []
    for lengths in ((30,), (1, 4, 5, 5, 15)):
        torch.manual_seed(3)
        streams = Streams(corridors(4, mode, poison=False), policy)
        parts = [streams.segment(steps)._replace(state=()) for steps in lengths]
        records.append([torch.cat(column, 1) for column in zip(*map(tensor_leaves, parts), strict=True)])
    assert all(map(torch.equal, *records))


@pytest.mark.parametrize("make", [remembering, Slow])
def test_whole_episodes_are_the_same_in_every_autoreset_mode_and_in_rounds(make):
    records = []
    for mode in MODES:
        policy = make()
        torch.manual_seed(3)
        draws = sf.draw(TrajectoryDistribution(corridors(4, mode, poison=False), policy), rewards, 10)
        assert all(len(leaf) == 10 for leaf in tensor_leaves(draws.x.state))
        assert torch.equal(draws.x.starts[:, 0], draws.mask[:, 0])
        gradients = torch.autograd.grad(sf.surrogate(draws).mean(), list(policy.parameters()))
        records.append([*tensor_leaves(draws.x), draws.log_prob, *gradients])
        if make is remembering:
            log_prob, _ = by_hand(policy, draws.x, draws.x.state)
            assert (log_prob - draws.log_prob).abs().max() < 1e-12
    for other in records[1:]:
        assert all(map(torch.equal, records[0], other))


def test_torch_cells_learn_from_segments_of_a_native_environment():
    env = gymnasium.make_vec("CartPole-v1", num_envs=3, vectorization_mode="vector_entry_point")
    for core in (nn.GRUCell(4, 8), nn.LSTMCell(4, 8)):
        torch.manual_seed(0)
        policy = RecurrentPolicy(core, CategoricalPolicy(nn.Linear(8, 2)))
        p = SegmentDistribution(env, policy, 40)
        optimizer = torch.optim.SGD(policy.parameters(), lr=1e-3)
        for _ in range(4):  # the carried state is that of older parameters, and what was acted is what is scored
            optimizer.zero_grad()
            sf.expectation(p, rewards, 3).backward()
            optimizer.step()
        assert all(parameter.grad.abs().sum() > 0 for parameter in policy.parameters())


def test_the_random_numbers_do_not_depend_on_what_is_looked_at():
    policy = remembering()
    torch.manual_seed(5)
    looked_at = sf.draw(TrajectoryDistribution(corridors(4), policy), rewards, 4).x
    torch.manual_seed(5)
    plain = rollout(corridors(4), policy, 4)
    assert all(map(torch.equal, tensor_leaves(looked_at), tensor_leaves(plain)))


class Forgetful(Slow):
    """Unrolls without the resets."""

    def unrolled(self, observations, starts, state):
        return super().unrolled(observations, torch.zeros_like(starts), state)


class Shared(Slow):
    def initial_state(self, num_streams):
        return {"sum": torch.zeros((), dtype=torch.float64), "count": torch.zeros(num_streams)}


class Stateless(Slow):
    def forward(self, observations, state):
        return super().forward(observations, state)[0]


class Stepwise(Slow):
    unrolled = None


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        (Forgetful, sf.ScorefnError, "log-probability .* when it acted and .* when it was scored"),
        (Shared, sf.ShapeError, r"initial_state\(4\) has the part \(\), but each .* number of streams, \(4, ...\)"),
        (Stateless, sf.ScorefnError, r"so it is recurrent, but it returned Categorical: return \(distribution, new"),
        (Stepwise, sf.ScorefnError, r"so it is recurrent, but it has no method unrolled\("),
    ],
)
def test_what_is_no_recurrent_policy_is_refused(kind, error, message):
    p = SegmentDistribution(corridors(4, MODES[1], poison=False), kind(), 17)
    with pytest.raises(error, match=message):
        sf.draw(p, rewards, 4)
