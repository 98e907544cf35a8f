"""Value functions."""

import pytest
import torch
from torch import nn
from torch.distributions import Bernoulli, Normal

import scorefn as sf
from tests.reducers.baseline_draws import draws_of, read, update


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
