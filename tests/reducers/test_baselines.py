"""Baselines: what they read, when they learn, and what they keep."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributions import Bernoulli, Normal

import scorefn as sf


def draws_of(signal, **fields):
    """Draws whose own signal is the given one, `[N, *B, K]`: each decision is charged with one value."""
    K = signal.shape[-1]
    log_prob = torch.randn_like(signal).requires_grad_()
    credit = sf.Influence(torch.eye(K, dtype=torch.bool))
    return sf.Draws(torch.zeros(len(signal)), log_prob, signal, credit, **fields)


def read(baseline, signal, **fields):
    return baseline(signal, draws_of(signal, **fields))


def update(baseline, signal, **fields):
    baseline.update(signal, draws_of(signal, **fields))


# ------------------------------------------------------------------------------------------------ leave-one-out


@st.composite
def crowds(draw):
    """Draws with any groups, blocks and absent decisions, of at least two blocks."""
    n = draw(st.integers(2, 7))
    batch = draw(st.sampled_from([(), (2,), (2, 1)]))
    k = draw(st.integers(1, 3))
    labels = st.one_of(st.none(), st.lists(st.integers(-2, 3), min_size=n, max_size=n))
    group, block = draw(labels), draw(labels.filter(lambda b: b is None or len(set(b)) > 1))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    signal = torch.randn(n, *batch, k, generator=generator, dtype=torch.float64)
    mask = draw(st.one_of(st.none(), st.just(torch.rand(n, *batch, k, generator=generator) < 0.6)))
    return signal, {
        "group": None if group is None else torch.tensor(group),
        "block": None if block is None else torch.tensor(block),
        "mask": mask,
    }


def by_a_double_loop(signal, group, block, mask):
    """The definition: the mean over the others of i's group outside i's block, where the decision is present."""
    n, right, alone = len(signal), torch.zeros_like(signal), 0
    for i in range(n):
        others = [
            j
            for j in range(n)
            if (group is None or group[j] == group[i]) and (j != i if block is None else block[j] != block[i])
        ]
        alone += not others
        for place in torch.cartesian_prod(*[torch.arange(s) for s in signal.shape[1:]]).reshape(-1, signal.ndim - 1):
            at = tuple(place.tolist())
            seen = [signal[j][at] for j in others if mask is None or mask[j][at]]
            right[i][at] = torch.stack(seen).mean() if seen else 0.0
    return right, alone


@settings(max_examples=60)
@given(crowds())
def test_leave_one_out_is_the_double_loop(crowd):
    signal, fields = crowd
    draws = draws_of(signal, **fields)
    right, alone = by_a_double_loop(signal, fields["group"], fields["block"], fields["mask"])
    torch.testing.assert_close(sf.LeaveOneOut()(signal, draws), right, rtol=1e-12, atol=1e-12)
    assert sf.LeaveOneOut().singletons(draws) == alone


def test_leave_one_out_of_total_credit_is_shared_by_the_decisions():
    log_prob, fx = torch.randn(5, 2, 3, requires_grad=True), torch.randn(5, 2, 3)
    draws = sf.Draws(torch.zeros(5), log_prob, fx)
    b = sf.LeaveOneOut()(draws.signal(), draws)
    right, _ = by_a_double_loop(fx.sum(-1, keepdim=True), None, None, None)
    torch.testing.assert_close(b.expand(5, 2, 3), right.expand(5, 2, 3))


def test_leave_one_out_never_sees_its_own_block():
    signal = torch.randn(6, 1, dtype=torch.float64)
    block = torch.tensor([0, 0, 1, 1, 2, 2])
    before = read(sf.LeaveOneOut(), signal, block=block)
    signal[2:4] += 100.0
    after = read(sf.LeaveOneOut(), signal, block=block)
    torch.testing.assert_close(before[2:4], after[2:4], rtol=0.0, atol=1e-12)
    assert (after - before)[[0, 1, 4, 5]].min() > 49


def test_a_singleton_group_reads_zero_and_is_counted():
    signal = torch.tensor([[1.0], [2.0], [4.0], [8.0]])
    draws = draws_of(signal, group=torch.tensor([0, 1, 1, 5]))
    assert sf.LeaveOneOut()(signal, draws).flatten().tolist() == [0.0, 4.0, 2.0, 0.0]
    assert sf.LeaveOneOut().singletons(draws) == 2
    assert sf.LeaveOneOut().singletons(draws_of(signal)) == 0


# ------------------------------------------------------------------------------------------------ constants


@pytest.mark.parametrize("shape", [(), (3,), (1,), (2, 3), (2, 1), (5, 2, 3), (5, 1, 1), (1, 2, 3)])
def test_a_constant_broadcasts_from_the_right(shape):
    signal, b = torch.randn(5, 2, 3), torch.randn(shape)
    assert torch.equal(read(sf.Constant(b), signal), b.expand(5, 2, 3))


def test_a_constant_per_decision_meets_a_signal_without_size():
    draws = sf.Draws(torch.zeros(5), torch.randn(5, 3, requires_grad=True), torch.randn(5, 1))
    b = torch.randn(3)
    found = torch.autograd.grad(sf.surrogate(draws, baseline=sf.Constant(b)).sum(), draws.log_prob)[0]
    torch.testing.assert_close(found, draws.fx - b)


@pytest.mark.parametrize("b", [2, 2.0, True, torch.tensor(2), torch.tensor(2.0, dtype=torch.float64)])
def test_a_constant_takes_the_dtype_of_the_signal(b):
    signal = torch.randn(5, 2)
    assert read(sf.Constant(b), signal).dtype == torch.float32
    assert (read(sf.Constant(b), signal) == float(b)).all()


def test_a_constant_is_detached():
    b = torch.randn(2, requires_grad=True)
    assert not read(sf.Constant(b), torch.randn(5, 2)).requires_grad


# ------------------------------------------------------------------------------------------------ moving average


def corrected(means, decay):
    """sum_s decay^(t-s) m_s / sum_s decay^(t-s), in closed form."""
    weight = decay ** torch.arange(len(means) - 1, -1, -1, dtype=means.dtype)
    if decay == 0.0:
        return means[-1]
    return (weight.reshape(-1, *[1] * (means.ndim - 1)) * means).sum(0) / weight.sum()


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.999])
def test_moving_average_reads_zero_first_and_is_corrected_for_it(decay):
    baseline, signals = sf.MovingAverage(decay), torch.randn(6, 7, 2, 3, dtype=torch.float64)
    assert torch.equal(read(baseline, signals[0]), torch.zeros(7, 2, 3))
    for t in range(6):
        update(baseline, signals[t])
        right = corrected(signals[: t + 1].mean(1), decay).expand(7, 2, 3)
        torch.testing.assert_close(read(baseline, signals[0]), right, rtol=1e-11, atol=1e-12)


def test_a_constant_signal_is_read_as_it_is_from_the_first_update_on():
    """The trap of a debiased value that is stored and debiased again shows from the second step on."""
    baseline = sf.MovingAverage(0.98)
    for _ in range(100):
        update(baseline, torch.full((3, 1), 7.0))
        torch.testing.assert_close(read(baseline, torch.zeros(3, 1)), torch.full((3, 1), 7.0))


def test_reading_changes_nothing():
    baseline = sf.MovingAverage()
    update(baseline, torch.randn(3, 2))
    before = pickle.dumps(vars(baseline))
    for _ in range(3):
        read(baseline, torch.randn(3, 2))
        read(baseline, torch.randn(3, 5))
    assert pickle.dumps(vars(baseline)) == before


def test_moving_average_counts_each_decision_where_it_is_present():
    baseline = sf.MovingAverage(0.5)
    signal = torch.tensor([[1.0, 10.0], [3.0, 20.0]])
    update(baseline, signal, mask=torch.tensor([[True, True], [True, False]]))
    assert read(baseline, signal)[0].tolist() == [2.0, 10.0]
    update(baseline, signal + 1, mask=torch.tensor([[True, False], [True, False]]))  # the second one is absent
    right = [(0.5 * 2.0 + 3.0) / 1.5, 10.0]
    torch.testing.assert_close(read(baseline, signal)[0], torch.tensor(right))


def test_moving_average_grows_with_the_episodes():
    baseline = sf.MovingAverage(0.5)
    update(baseline, torch.tensor([[2.0]]))
    assert read(baseline, torch.zeros(1, 3)).tolist() == [[2.0, 0.0, 0.0]]
    update(baseline, torch.tensor([[4.0, 6.0, 8.0]]))
    right = torch.tensor([[(0.5 * 2.0 + 4.0) / 1.5, 6.0, 8.0]])
    torch.testing.assert_close(read(baseline, torch.zeros(1, 3)), right)


def test_moving_average_meets_shorter_episodes():
    """A batch may be shorter than the one before; the later decisions keep what they have learned."""
    baseline = sf.MovingAverage(0.5)
    update(baseline, torch.tensor([[2.0, 4.0, 6.0]]))
    assert read(baseline, torch.zeros(1, 2)).tolist() == [[2.0, 4.0]]
    update(baseline, torch.tensor([[8.0, 8.0]]))
    right = torch.tensor([[(1.0 + 8.0) / 1.5, (2.0 + 8.0) / 1.5, 6.0]])
    torch.testing.assert_close(read(baseline, torch.zeros(1, 3)), right)


@pytest.mark.parametrize("batch", [(), (3,), (2, 1), (1, 2)])
def test_moving_average_refuses_another_batch_shape(batch):
    baseline = sf.MovingAverage()
    update(baseline, torch.randn(5, 2, 4))
    before = pickle.dumps(vars(baseline))
    with pytest.raises(sf.ShapeError, match=r"\(2,\)"):
        read(baseline, torch.randn(5, *batch, 4))
    with pytest.raises(sf.ShapeError, match=r"\(2,\)"):
        update(baseline, torch.randn(5, *batch, 4))
    assert pickle.dumps(vars(baseline)) == before


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda b: pickle.loads(pickle.dumps(b))])
def test_a_copy_continues_bit_for_bit_on_its_own(copied):
    baseline = sf.MovingAverage(0.7)
    for _ in range(3):
        update(baseline, torch.randn(5, 2))
    twin, signal = copied(baseline), torch.randn(5, 2)
    before = read(baseline, signal).clone()
    update(twin, signal)
    assert torch.equal(read(baseline, signal), before)
    update(baseline, signal)
    assert torch.equal(read(baseline, signal), read(twin, signal))
    assert twin.decay == 0.7


def test_moving_average_survives_an_update_that_follows_a_refusal():
    theta, baseline = torch.zeros(2, requires_grad=True), sf.MovingAverage()
    p = Bernoulli(logits=theta)
    sf.expectation(p, lambda x: x.sum(-1), 5, baseline=baseline)
    before = pickle.dumps(vars(baseline))
    with pytest.raises(sf.NonFiniteError):
        sf.expectation(p, lambda x: x.sum(-1) / 0, 5, baseline=baseline)
    assert pickle.dumps(vars(baseline)) == before


# ------------------------------------------------------------------------------------------------ value functions


def ones(draws):
    return torch.ones(*draws.log_prob.shape, 2)


class Answer(nn.Module):
    """Maps anything to its one parameter."""

    def __init__(self, shape):
        super().__init__()
        self.value = nn.Parameter(torch.randn(shape))

    def forward(self, features):
        return self.value


@pytest.mark.parametrize("shape", [(5, 2, 3), (2, 3), (5, 2, 3, 1)])
def test_a_value_function_may_answer_in_three_shapes(shape):
    signal = torch.randn(5, 2, 3)
    module = Answer(shape)
    right = module.value.reshape(shape[:-1] if len(shape) == 4 else shape).expand(5, 2, 3)
    baseline = sf.ValueFunction(module, ones)
    assert torch.equal(read(baseline, signal), right)
    surrogate = sf.surrogate(draws_of(signal), baseline=baseline)
    assert torch.autograd.grad(surrogate.sum(), module.value, allow_unused=True) == (None,)
    torch.testing.assert_close(baseline.loss(signal, draws_of(signal)), (right - signal).square().mean())


def test_the_loss_counts_present_decisions_only():
    signal = torch.tensor([[1.0, 1e30], [2.0, 5.0]])
    mask = torch.tensor([[True, False], [True, True]])
    draws = draws_of(signal, mask=mask)
    module = Answer((2,))
    loss = sf.ValueFunction(module, ones).loss(signal, draws)
    v = module.value
    right = ((v[0] - 1) ** 2 + (v[0] - 2) ** 2 + (v[1] - 5) ** 2) / 3
    torch.testing.assert_close(loss, right)
    torch.testing.assert_close(torch.autograd.grad(loss, v)[0], torch.autograd.grad(right, v)[0])


def test_the_loss_reaches_neither_the_measure_nor_the_features():
    theta, trunk = torch.zeros(3, requires_grad=True), nn.Linear(2, 2)
    module = nn.Linear(2, 1)
    fx_parameter = torch.tensor(1.0, requires_grad=True)
    draws = sf.draw(Normal(theta, 1.0), lambda x: fx_parameter * x, 4)
    baseline = sf.ValueFunction(module, lambda d: {"seen": trunk(torch.ones(4, 3, 1, 2))}["seen"])
    loss = baseline.loss(draws.signal(), draws)
    loss.backward()
    assert theta.grad is None
    assert fx_parameter.grad is None
    assert trunk.weight.grad is None
    assert module.weight.grad is not None


def test_the_features_are_the_context_unless_given():
    signal = torch.randn(4, 3)
    module = nn.Linear(2, 1)
    context = torch.randn(4, 3, 2, requires_grad=True)
    found = read(sf.ValueFunction(module), signal, context=context)
    torch.testing.assert_close(found, module(context).squeeze(-1).detach())
    sf.ValueFunction(module).loss(signal, draws_of(signal, context=context)).backward()
    assert context.grad is None
    given_features = read(sf.ValueFunction(module, lambda d: d.context + 1), signal, context=context)
    torch.testing.assert_close(given_features, module(context + 1).squeeze(-1).detach())


def test_a_context_may_be_a_pytree():
    class Sum(nn.Module):
        def forward(self, features):
            return features["a"] + features["b"][0]

    signal = torch.randn(4, 3)
    context = {"a": torch.randn(4, 3), "b": [torch.randn(4, 3), "a name"]}
    found = read(sf.ValueFunction(Sum()), signal, context=context)
    assert torch.equal(found, context["a"] + context["b"][0])


def test_update_steps_the_optimizer_once_and_only_where_there_is_one():
    signal, module = torch.full((4, 1), 3.0), Answer((1,))
    start = module.value.detach().clone()
    update(sf.ValueFunction(module, ones), signal)
    assert torch.equal(module.value, start)
    baseline = sf.ValueFunction(module, ones, optimizer=torch.optim.SGD(module.parameters(), lr=0.25))
    module.value.grad = torch.full((1,), 1e6)  # of some other loss
    update(baseline, signal)
    torch.testing.assert_close(module.value.detach(), start - 0.25 * 2 * (start - 3.0))
    before = module.value.detach().clone()
    read(baseline, signal)
    assert torch.equal(module.value, before)


def test_a_value_function_learns_what_it_is_told():
    theta, module = torch.zeros(2, requires_grad=True), Answer((2, 1))
    baseline = sf.ValueFunction(module, ones, optimizer=torch.optim.SGD(module.parameters(), lr=1.0))
    for _ in range(40):
        sf.expectation(Bernoulli(logits=theta), lambda x: x + 10, 50, baseline=baseline)
    # the mean of 50 draws has a standard deviation of 0.07, smoothed further: 6 of them, false alarm below 1e-6
    assert (module.value - 10.5).abs().max() < 6 * 0.5 / 50**0.5


@pytest.mark.parametrize(
    "baseline", [sf.Constant(1.0), sf.LeaveOneOut(), sf.MovingAverage(), sf.ValueFunction(Answer((1,)), ones)]
)
def test_each_declares_that_it_is_unbiased(baseline):
    assert baseline.unbiased is True


# ------------------------------------------------------------------------------------- value functions under stress


def padded(observations, mask):
    logits = torch.zeros(2, requires_grad=True)
    log_prob = logits.log_softmax(0).expand(3, 2)
    return logits, sf.Draws(torch.zeros(3), log_prob, torch.ones(3, 2), mask=mask, context=observations)


def test_padding_that_is_not_a_number_reaches_no_value_function():
    mask = torch.tensor([[True, True], [True, False], [True, True]])
    observations = torch.where(mask.unsqueeze(-1), torch.ones(3, 2, 1), torch.nan)
    _, draws = padded(observations, mask)
    module = torch.nn.Linear(1, 1)
    baseline = sf.ValueFunction(module, optimizer=torch.optim.SGD(module.parameters(), 0.1))
    assert sf.surrogate(draws, baseline=baseline).isfinite().all()
    baseline.update(draws.signal(), draws)
    assert all(parameter.isfinite().all() for parameter in module.parameters())


def test_a_gradient_that_is_not_finite_is_not_stepped_and_statistics_stay():
    class Overflowing(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.BatchNorm1d(1)
            self.weight = torch.nn.Parameter(torch.tensor(0.0))

        def forward(self, features):
            flat = self.norm(features.reshape(-1, 1)).reshape(features.shape)
            return flat + self.weight.abs().sqrt()  # value 0, derivative infinite

    mask = torch.ones(3, 2, dtype=torch.bool)
    _, draws = padded(torch.arange(6.0).reshape(3, 2, 1), mask)
    module = Overflowing()
    baseline = sf.ValueFunction(module, optimizer=torch.optim.SGD(module.parameters(), 0.1))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(sf.NonFiniteError, match="not stepped"):
        baseline.update(torch.full((3, 2), 2.0), draws)
    after = module.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_the_loss_sends_no_gradient_into_the_signal():
    mask = torch.ones(3, 2, dtype=torch.bool)
    _, draws = padded(torch.ones(3, 2, 1), mask)
    signal = torch.ones(3, 2, requires_grad=True)
    loss = sf.ValueFunction(torch.nn.Linear(1, 1)).loss(signal, draws)
    with pytest.raises(RuntimeError, match="unused"):
        torch.autograd.grad(loss, signal)


def test_the_loss_of_few_decisions_is_their_mean():
    """One present decision counts once; none at all gives 0, not 0 / 0."""
    observations = torch.ones(3, 2, 1)
    module = Fill(3.0)
    for present, wanted in ((1, 4.0), (0, 0.0)):
        mask = torch.zeros(3, 2, dtype=torch.bool)
        mask[0, :present] = True
        _, draws = padded(observations, mask)
        assert sf.ValueFunction(module).loss(torch.ones(3, 2), draws).item() == wanted


class Fill(nn.Module):
    """The same value for every decision."""

    def __init__(self, value):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))

    def forward(self, features):
        return self.value.expand(features.shape[:-1])


def test_reading_is_evaluation_and_leaves_the_mode_of_every_part():
    module = nn.Sequential(nn.Linear(1, 8), nn.Dropout(0.5), nn.Flatten(0, 1), nn.BatchNorm1d(8), nn.Linear(8, 1))
    module.append(nn.Unflatten(0, (3, 2)))
    module[0].eval()  # a part that the user froze
    modes = [part.training for part in module.modules()]
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    _, draws = padded(torch.randn(3, 2, 1), None)
    baseline, signal = sf.ValueFunction(module), draws.signal()
    assert torch.equal(baseline(signal, draws), baseline(signal, draws))
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert [part.training for part in module.modules()] == modes


def test_a_refused_step_leaves_no_gradients():
    module = Fill(float("inf"))
    _, draws = padded(torch.ones(3, 2, 1), None)
    module.value.grad = torch.ones(())
    baseline = sf.ValueFunction(module, optimizer=torch.optim.SGD(module.parameters(), 0.1))
    with pytest.raises(sf.NonFiniteError, match="not stepped"):
        baseline.update(draws.signal(), draws)
    assert module.value.grad is None

    class Steep(Fill):
        def forward(self, features):
            return (self.value - self.value.detach()).abs().sqrt().expand(features.shape[:-1])  # of infinite slope

    module = Steep(1.0)
    baseline = sf.ValueFunction(module, optimizer=torch.optim.SGD(module.parameters(), 0.1))
    with pytest.raises(sf.NonFiniteError, match="not stepped"):
        baseline.update(draws.signal(), draws)
    assert module.value.grad is None


@pytest.mark.parametrize("mask", [None, torch.tensor([[True, True], [True, False], [False, True]])])
def test_the_fit_sends_no_gradient_into_the_features(mask):
    observations = torch.ones(3, 2, 1, requires_grad=True)
    _, draws = padded(observations, mask)
    module = nn.Linear(1, 1)
    sf.ValueFunction(module, optimizer=torch.optim.SGD(module.parameters(), 0.1)).update(draws.signal(), draws)
    assert observations.grad is None


def test_a_value_function_names_the_shapes_it_may_return():
    _, draws = padded(torch.ones(3, 2, 1), None)
    with pytest.raises(sf.ShapeError, match=r"The value function returned \(3, 2, 4\)"):
        sf.ValueFunction(nn.Linear(1, 4)).loss(draws.signal(), draws)


def test_a_graph_of_many_paths_is_searched_once():
    """Sixty doublings make 2^60 paths from log_prob to its parameter."""
    logits = torch.zeros(2, requires_grad=True)
    log_prob = logits.log_softmax(0).expand(3, 2)
    for _ in range(60):
        log_prob = log_prob / 2 + log_prob / 2
    draws = sf.Draws(torch.zeros(3), log_prob, torch.ones(3, 2), context=torch.ones(3, 2, 1))
    assert sf.surrogate(draws, baseline=sf.ValueFunction(nn.Linear(1, 1))).isfinite().all()


@pytest.mark.parametrize("b", [torch.nan, -torch.inf, torch.tensor([0.0, torch.inf])])
def test_a_constant_that_is_not_finite_is_refused(b):
    with pytest.raises(sf.NonFiniteError, match="b, which would make"):
        sf.Constant(b)


def test_a_constant_is_a_number_or_a_tensor():
    with pytest.raises(sf.ScorefnError, match="b is a list"):
        sf.Constant([1.0])


def test_a_constant_may_be_made_inside_a_transform():
    """Values cannot be read there, so that they are not looked at."""
    signal = torch.zeros(2, 1)
    draws = draws_of(signal)
    value = torch.vmap(lambda b: sf.Constant(b)(signal, draws))(torch.ones(3))
    assert torch.equal(value, torch.ones(3, 2, 1))
