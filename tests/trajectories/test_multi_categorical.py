"""Several choices at once: against torch's Categorical, SciPy and enumeration."""

import itertools

import pytest
import torch
from scipy import stats
from torch import nn
from torch.distributions import Categorical, kl_divergence

import scorefn as sf
from scorefn.diagnostics import exact_expectation
from scorefn.trajectories import MultiCategorical, MultiCategoricalPolicy

COUNTS = (3, 1, 2)


def example(*batch, counts=COUNTS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*batch, sum(counts), dtype=torch.float64, generator=generator)


def separate(logits, counts=COUNTS):
    return [Categorical(logits=part) for part in logits.split(counts, -1)]


@pytest.mark.parametrize("batch", [(), (4,), (4, 2)])
def test_it_is_the_product_of_its_choices(batch):
    logits = example(*batch)
    p = MultiCategorical(COUNTS, logits)
    assert p.batch_shape == batch
    assert p.event_shape == (3,)
    values = p.enumerate_support()
    assert values.shape == (6, *batch, 3)
    assert p.enumerate_support(expand=False).shape == (6, *[1] * len(batch), 3)
    by_hand = sum(q.log_prob(values[..., d]) for d, q in enumerate(separate(logits)))
    assert p.log_prob(values).shape == (6, *batch)
    assert (p.log_prob(values) - by_hand).abs().max() < 1e-14
    assert (p.log_prob(values).exp().sum(0) - 1).abs().max() < 1e-14
    assert (p.entropy() - sum(q.entropy() for q in separate(logits))).abs().max() < 1e-14
    assert torch.equal(p.mode, torch.stack([q.mode for q in separate(logits)], -1))
    assert p.sample((5, 7)).shape == (5, 7, *batch, 3)
    assert p.sample().dtype == torch.int64
    assert p.support.check(p.sample((100,))).all()
    assert not p.support.check(torch.tensor([[3, 0, 0], [0, 1, 0], [0, 0, 2], [-1, 0, 0]])).any()


def test_every_value_once_in_the_order_of_the_choices():
    values = MultiCategorical(COUNTS, example()).enumerate_support()
    assert values.tolist() == [list(value) for value in itertools.product(range(3), range(1), range(2))]


@pytest.mark.parametrize("counts", [(4,), (2, 2), (3, 1, 2)])
def test_divergence_is_the_sum_of_the_choices_divergences(counts):
    first, second = example(5, counts=counts), example(5, counts=counts, seed=1)
    p, q = MultiCategorical(counts, first), MultiCategorical(counts, second)
    by_hand = sum(map(kl_divergence, separate(first, counts), separate(second, counts)))
    assert (kl_divergence(p, q) - by_hand).abs().max() < 1e-14
    assert kl_divergence(p, p).abs().max() == 0


def test_divergence_between_choices_of_other_sizes_is_refused():
    p, q = MultiCategorical([2, 3], torch.zeros(5)), MultiCategorical([3, 2], torch.zeros(5))
    with pytest.raises(sf.ShapeError, match=r"\[2, 3\] and among \[3, 2\].*same counts"):
        kl_divergence(p, q)


def test_what_is_ruled_out_costs_nothing():
    logits = torch.tensor([0.0, -torch.inf, 1.0, 2.0], dtype=torch.float64, requires_grad=True)
    p = MultiCategorical([2, 2], logits)
    q = MultiCategorical([2, 2], torch.zeros(4, dtype=torch.float64))
    assert p.log_prob(torch.tensor([1, 0])) == -torch.inf
    assert torch.isfinite(p.entropy())
    assert torch.isfinite(kl_divergence(p, q))
    assert (p.sample((1000,))[:, 0] == 0).all()
    for value in (p.entropy(), kl_divergence(p, q), p.log_prob(torch.tensor([0, 1]))):
        (gradient,) = torch.autograd.grad(value, logits, retain_graph=True)
        assert torch.isfinite(gradient).all()


def test_frequencies_agree_with_the_probabilities():
    """A chi-square test over all six values, 100,000 draws: p below 1e-6 is a false alarm once in a million seeds."""
    policy = MultiCategoricalPolicy(Constant(example()), COUNTS)
    p = policy(torch.zeros(1))
    for actions in (policy.act(torch.zeros(100_000, 1)), p.sample((100_000,))):
        seen = torch.bincount(actions[:, 0] * 2 + actions[:, 2], minlength=6)
        expected = p.log_prob(p.enumerate_support()).exp().detach()
        assert stats.chisquare(seen.numpy(), 100_000 * (expected / expected.sum()).numpy()).pvalue > 1e-6


def test_act_is_the_draw_of_the_distribution():
    policy = MultiCategoricalPolicy(nn.Linear(4, 6), COUNTS)
    x = torch.randn(50, 4)
    torch.manual_seed(1)
    acted = policy.act(x)
    torch.manual_seed(1)
    drawn = policy(x).sample()
    assert torch.equal(acted, drawn)
    assert not acted.requires_grad


def test_the_score_has_mean_zero_and_the_gradient_is_exact():
    logits = example().requires_grad_()
    p = MultiCategorical(COUNTS, logits)
    values = p.enumerate_support()
    probability = p.log_prob(values).exp()
    (score_mean,) = torch.autograd.grad(probability.detach() @ p.log_prob(values), logits, retain_graph=True)
    assert score_mean.abs().max() < 1e-15

    def f(x):
        return (x.double() - 0.3).square().sum(-1) + x[..., 0] * x[..., 2]

    (exact,) = torch.autograd.grad(probability @ f(values), logits, retain_graph=True)
    (estimate,) = torch.autograd.grad(probability.detach() @ (f(values) * p.log_prob(values)), logits)
    assert (estimate - exact).abs().max() < 1e-14
    assert abs(exact_expectation(MultiCategorical(COUNTS, logits), f).item() - (probability @ f(values)).item()) < 1e-14


def test_it_is_a_measure_as_it_stands():
    logits = example().requires_grad_()
    sf.expectation(MultiCategorical(COUNTS, logits), lambda x: x.double().sum(-1), 10).backward()
    assert torch.isfinite(logits.grad).all()


def test_expanded():
    p = MultiCategorical(COUNTS, example()).expand((4, 2))
    assert p.batch_shape == (4, 2)
    assert p.sample().shape == (4, 2, 3)
    assert p.log_prob(p.sample()).shape == (4, 2)
    assert not MultiCategorical(COUNTS, example(), validate_args=False).expand((4,))._validate_args
    assert MultiCategorical(COUNTS, example(), validate_args=True).expand((4,))._validate_args


class Constant(nn.Module):
    def __init__(self, output):
        super().__init__()
        self.output = nn.Parameter(output)

    def forward(self, observations):
        return self.output.expand(*observations.shape[:-1], *self.output.shape)


# --------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("wrong", [(5,), (4, 7), ()])
def test_another_number_of_logits_is_refused(wrong):
    with pytest.raises(sf.ShapeError, match=r"logits have shape .*\[3, 1, 2\] values need \[\*batch, 6\]"):
        MultiCategorical(COUNTS, torch.zeros(wrong))
    if wrong:
        with pytest.raises(sf.ShapeError, match=r"need \[\*batch, 6\]"):
            MultiCategoricalPolicy(Constant(torch.zeros(wrong)), COUNTS)(torch.zeros(2, 1))


@pytest.mark.parametrize("counts", [[2, 0], [2.0], [True], [-1]])
def test_counts_that_are_none_are_refused(counts):
    with pytest.raises(sf.ScorefnError, match="each of the counts must be an integer of at least 1"):
        MultiCategoricalPolicy(nn.Linear(2, 2), counts)


def test_no_choice_at_all_is_refused():
    with pytest.raises(sf.ScorefnError, match="counts is empty.*at least one choice"):
        MultiCategorical([], torch.zeros(3, 0))


def test_values_of_another_length_are_refused():
    p = MultiCategorical(COUNTS, torch.zeros(4, 6), validate_args=False)
    with pytest.raises(sf.ShapeError, match=r"value has shape \(4, 2\).*ends with 3 numbers"):
        p.log_prob(torch.zeros(4, 2))


@pytest.mark.parametrize("validate_args", [True, False])
@pytest.mark.parametrize("wrong", [3, -1])
def test_values_outside_are_refused_and_never_read_from_the_neighbour(wrong, validate_args):
    p = MultiCategorical(COUNTS, torch.zeros(4, 6), validate_args=validate_args)
    with pytest.raises((ValueError, RuntimeError, IndexError)):
        p.log_prob(torch.tensor([[wrong, 0, 0]] * 4))
