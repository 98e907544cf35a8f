"""Policies with a memory: unrolled equals stepping, and the gradient through time that of the explicit loop."""

import pytest
import torch
from torch import nn

import scorefn as sf
from scorefn.trajectories import (
    BernoulliPolicy,
    CategoricalPolicy,
    GaussianPolicy,
    MultiCategoricalPolicy,
    ObservationNormalization,
    RecurrentPolicy,
    Tanh,
)

N, T, OBS, HIDDEN = 4, 6, 3, 5
STARTS = torch.tensor(
    [[1, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0], [0, 1, 1, 0, 0, 1], [1, 0, 0, 0, 0, 0]], dtype=torch.bool
)


class Learned(nn.Module):
    """A core of the user's own: a learned initial state, and a dict of two tensors, one of them a matrix."""

    def __init__(self):
        super().__init__()
        self.cell, self.first = nn.GRUCell(OBS, HIDDEN), nn.Parameter(torch.randn(HIDDEN))

    def initial_state(self, num_streams):
        zeros = self.first.new_zeros(num_streams, 2, OBS)
        return {"a": self.first.expand(num_streams, -1), "past": zeros}

    def forward(self, features, state):
        past = torch.stack([features, state["past"][:, 0]], 1)
        return {"a": self.cell(past.sum(1), state["a"]), "past": past}


CORES = {
    "gru": lambda: nn.GRUCell(OBS, HIDDEN),
    "lstm": lambda: nn.LSTMCell(OBS, HIDDEN),
    "rnn": lambda: nn.RNNCell(OBS, HIDDEN),
    "learned": Learned,
}
HEADS = {
    "categorical": lambda: CategoricalPolicy(nn.Linear(HIDDEN, 3)),
    "multicategorical": lambda: MultiCategoricalPolicy(nn.Linear(HIDDEN, 5), [2, 3]),
    "bernoulli": lambda: BernoulliPolicy(nn.Linear(HIDDEN, 2)),
    "gaussian": lambda: GaussianPolicy(nn.Linear(HIDDEN, 2), nn.Linear(HIDDEN, 2)),
}


def leaves(state):
    return list(state.values()) if isinstance(state, dict) else list(state) if isinstance(state, tuple) else [state]


def like(state, values):
    return dict(zip(state, values, strict=True)) if isinstance(state, dict) else tuple(values)


def mixed(starts, initial, state):
    """By hand: the initial state in rows that start."""
    rows = [
        torch.stack([a[i] if starts[i] else b[i] for i in range(len(starts))])
        for a, b in zip(leaves(initial), leaves(state), strict=True)
    ]
    return rows[0] if isinstance(state, torch.Tensor) else like(state, rows)


def some_state(policy):
    initial = policy.initial_state(N)
    values = [torch.randn_like(leaf) for leaf in leaves(initial)]
    return values[0] if isinstance(initial, torch.Tensor) else like(initial, values)


def stepped(policy, observations, starts, state, actions):
    """Log-probabilities ``[N, T]`` by the explicit loop."""
    columns = []
    for t in range(observations.shape[1]):
        state = mixed(starts[:, t], policy.initial_state(len(starts)), state)
        distribution, state = policy(observations[:, t], state)
        columns.append(distribution.log_prob(actions[:, t]))
    return torch.stack(columns, 1)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("core", CORES)
def test_unrolled_equals_stepping_and_its_gradient_that_of_the_loop(core, head, float64):
    policy = RecurrentPolicy(CORES[core](), HEADS[head]())
    observations, state = torch.randn(N, T, OBS), some_state(policy)
    distribution = policy.unrolled(observations, STARTS, state)
    assert distribution.batch_shape == (N, T)
    actions = distribution.sample()
    log_prob = distribution.log_prob(actions)
    by_hand = stepped(policy, observations, STARTS, state, actions)
    assert (log_prob - by_hand).abs().max() < 1e-13
    weight = torch.randn(N, T)
    for gradient, exact in zip(
        torch.autograd.grad((weight * log_prob).sum(), list(policy.parameters())),
        torch.autograd.grad((weight * by_hand).sum(), list(policy.parameters())),
        strict=True,
    ):
        assert exact.abs().max() > 0
        assert (gradient - exact).abs().max() < 1e-12


@pytest.mark.parametrize("core", CORES)
def test_episodes_know_nothing_of_each_other(core):
    policy = RecurrentPolicy(CORES[core](), HEADS["categorical"]())
    observations, state = torch.randn(N, T, OBS, requires_grad=True), some_state(policy)
    logits = policy.unrolled(observations, STARTS, state).logits
    (gradient,) = torch.autograd.grad(logits[0, 3:].square().sum(), observations, retain_graph=True)
    assert not gradient[0, :3].any()
    assert not gradient[1:].any()
    assert gradient[0, 3:].abs().sum(-1).min() > 0
    (gradient,) = torch.autograd.grad(logits[1, 5].square().sum(), observations)
    assert gradient[1].abs().sum(-1).min() > 0  # through all of the time
    poisoned = observations.detach().clone()
    poisoned[0, :3] = torch.nan
    again = policy.unrolled(poisoned, STARTS, state).logits
    assert torch.isnan(again[0, :3]).all()
    assert torch.equal(again[0, 3:], logits[0, 3:])


def test_the_state_that_enters_is_a_constant():
    policy = RecurrentPolicy(CORES["lstm"](), HEADS["categorical"]())
    _, state = policy(torch.randn(N, OBS), policy.initial_state(N))
    assert state[0].requires_grad
    watched = tuple(leaf.detach().requires_grad_() for leaf in state)
    policy.unrolled(torch.randn(N, T, OBS), STARTS, watched).logits.sum().backward()
    assert watched[0].grad is None
    assert watched[1].grad is None


def test_truncation_drops_exactly_what_the_carried_state_owes():
    """Whole: d log p / d parameters by the loop from the start; truncated: the same with the carried state held."""
    policy = RecurrentPolicy(CORES["gru"](), HEADS["categorical"]()).double()
    x = torch.randn(N, T, OBS, dtype=torch.float64)
    start = torch.zeros(N, T, dtype=torch.bool)
    start[:, 0] = True
    state = policy.initial_state(N)
    for t in range(3):
        _, state = policy(x[:, t], state)
    actions = torch.zeros(N, 3, dtype=torch.int64)
    parameters = list(policy.core.parameters())
    whole = policy.unrolled(x, start).logits[:, 3:, 0].sum()
    truncated = policy.unrolled(x[:, 3:], start[:, 3:] & False, state).log_prob(actions).sum()
    assert abs((whole - truncated).item()) < 1e-12
    constant = state.detach().requires_grad_()
    held = stepped(policy, x[:, 3:], start[:, 3:] & False, constant, actions).sum()
    (owed,) = torch.autograd.grad(held, constant, retain_graph=True)
    dropped = torch.autograd.grad(state, parameters, owed)
    for full, part, rest in zip(
        torch.autograd.grad(whole, parameters), torch.autograd.grad(truncated, parameters), dropped, strict=True
    ):
        assert (full - part - rest).abs().max() < 1e-12
        assert rest.abs().max() > 1e-3


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("core", CORES)
def test_act_is_a_draw_of_the_same_distribution(core, head):
    policy = RecurrentPolicy(CORES[core](), HEADS[head]())
    observations, state = torch.randn(N, OBS), some_state(policy)
    torch.manual_seed(1)
    acted, after = policy.act(observations, state)
    torch.manual_seed(1)
    distribution, following = policy(observations, state)
    assert acted.shape == (N, *distribution.event_shape)
    assert not acted.requires_grad
    assert all(map(torch.equal, leaves(after), leaves(following)))
    torch.manual_seed(1)
    assert torch.equal(acted, policy.head.act(leaves(following)[0]))


def test_the_head_acts_for_itself():
    policy = RecurrentPolicy(CORES["gru"](), HEADS["categorical"]())
    policy.head.act = lambda features: torch.full((len(features),), 7)
    assert policy.act(torch.randn(N, OBS), policy.initial_state(N))[0].tolist() == [7] * N


def test_a_head_without_act_is_sampled():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = nn.Linear(HIDDEN, 3)

        def forward(self, features):
            return torch.distributions.Categorical(logits=self.network(features))

    policy = RecurrentPolicy(CORES["gru"](), Plain())
    acted, state = policy.act(torch.randn(N, OBS), policy.initial_state(N))
    assert acted.shape == (N,)
    assert state.shape == (N, HIDDEN)
    assert policy.executed(acted) is acted


def test_what_is_executed_is_what_the_head_says():
    head = GaussianPolicy(nn.Linear(HIDDEN, 1), torch.zeros(1), bounds=Tanh([-2.0], [2.0]))
    policy = RecurrentPolicy(CORES["gru"](), head)
    actions = torch.randn(N, 1) * 3
    assert torch.equal(policy.executed(actions), head.bounds(actions))


def test_the_initial_state_has_the_dtype_of_the_core():
    policy = RecurrentPolicy(CORES["lstm"](), HEADS["categorical"]()).double()
    first, second = policy.initial_state(7)
    assert first.shape == second.shape == (7, HIDDEN)
    assert first.dtype == torch.float64
    assert not first.any()
    assert not second.any()


def test_no_state_is_the_initial_one():
    policy = RecurrentPolicy(Learned(), HEADS["categorical"]())
    x, starts = torch.randn(N, T, OBS), torch.zeros(N, T, dtype=torch.bool)
    given = policy.unrolled(x, starts, policy.initial_state(N)).logits
    absent = policy.unrolled(x, starts).logits
    assert torch.equal(given, absent)
    absent.square().sum().backward()
    assert policy.core.first.grad.abs().max() > 0  # it is learned, not carried


def test_an_encoder_sees_rows_whatever_the_observations_are():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.image = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 2))
            self.normalization = ObservationNormalization(1)

        def forward(self, observations):
            return torch.cat([self.image(observations["image"]), self.normalization(observations["number"])], -1)

    policy = RecurrentPolicy(CORES["gru"](), HEADS["categorical"](), encoder=Encoder()).double()
    observations = {"image": torch.randn(N, T, 1, 4, 4).double(), "number": torch.randn(N, T, 1).double()}
    logits = policy.unrolled(observations, STARTS).logits
    state = policy.initial_state(N)
    for t in range(T):
        state = mixed(STARTS[:, t], policy.initial_state(N), state)
        distribution, state = policy({key: value[:, t] for key, value in observations.items()}, state)
        assert (distribution.logits - logits[:, t]).abs().max() < 1e-12


# --------------------------------------------------------------------------------------------------------- refusals


def test_a_core_of_whole_sequences_is_refused():
    with pytest.raises(sf.ScorefnError, match=r"GRU works through whole sequences.*use one step of it, nn.GRUCell"):
        RecurrentPolicy(nn.GRU(OBS, HIDDEN), HEADS["categorical"]())


def test_a_core_without_an_initial_state_is_refused():
    with pytest.raises(
        sf.ScorefnError, match=r"Linear has no initial state: use nn.GRUCell.*initial_state\(num_streams\)"
    ):
        RecurrentPolicy(nn.Linear(OBS, HIDDEN), HEADS["categorical"]())


X, NO = torch.zeros(N, T, OBS), torch.zeros(N, T, dtype=torch.bool)


@pytest.mark.parametrize(
    ("observations", "starts", "state", "message"),
    [
        (X, NO[0], None, r"starts must be \[N, T\] .* \(6,\)"),
        (X, NO[:, :0], None, r"starts must be \[N, T\] .* \(4, 0\)"),
        (X[:, :1], NO, None, r"observations has shape \(4, 1, 3\), .* \(4, 6\) it must lead with \(4, 6\)"),
        (X[:1], NO, None, r"observations has shape \(1, 6, 3\)"),
        (X.transpose(0, 1), NO, None, r"observations has shape \(6, 4, 3\)"),
        ({"a": X, "b": X[0]}, NO, None, r"observations has shape \(6, 3\)"),
        (X, NO, torch.zeros(1, HIDDEN), r"state has shape \(1, 5\), .* must lead with \(4,\)"),
        (X, NO, (torch.zeros(N, HIDDEN), torch.zeros(HIDDEN)), r"state has shape \(5,\)"),
    ],
)
def test_shapes_that_do_not_belong_together_are_refused(observations, starts, state, message):
    with pytest.raises(sf.ShapeError, match=message):
        RecurrentPolicy(CORES["gru"](), HEADS["categorical"]()).unrolled(observations, starts, state)


def test_starts_that_are_no_bools_are_refused():
    with pytest.raises(sf.ScorefnError, match=r"starts is torch.float32, but it must be torch.bool"):
        RecurrentPolicy(CORES["gru"](), HEADS["categorical"]()).unrolled(X, NO.float())
