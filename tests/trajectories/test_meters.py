"""The meters of a training run together, and what they refuse."""

import pytest
import torch
from torch.distributions import Bernoulli, Beta, Categorical, Independent, Normal, TransformedDistribution
from torch.distributions.transforms import TanhTransform

import scorefn as sf
from scorefn.trajectories import (
    explained_variance,
    gradient_noise,
    mean_entropy,
    mean_kl_divergence,
    policy_change,
    read_meters,
    split_halves,
)
from tests.trajectories.meter_cases import N, T, drawn, network, steps

pytestmark = pytest.mark.usefixtures("float64")


class TestExplainedVariance:
    def test_by_hand(self):
        signal, baseline = torch.tensor([[1.0, 2.0], [3.0, 6.0]]), torch.tensor([[1.0], [4.0]])
        assert explained_variance(signal, signal) == 1.0
        assert explained_variance(signal, torch.full((2, 2), 3.0)) == 0.0
        assert explained_variance(signal, baseline) == pytest.approx(1 - 6 / 14)
        assert explained_variance(signal, signal + 1) == pytest.approx(1 - 4 / 14)

    def test_mask(self):
        signal, mask = torch.tensor([[1.0, float("nan")], [3.0, 6.0]]), torch.tensor([[True, False], [True, True]])
        assert explained_variance(signal, torch.zeros(2, 1), mask) == pytest.approx(1 - 46 / (46 - 100 / 3))

    def test_constant_signal(self):
        found = explained_variance(torch.full((7,), 0.1, dtype=torch.float32), torch.zeros(7))
        assert found != found


class TestMeters:
    def test_are_the_meters(self):
        net = network(3, 5, 2)
        p = Categorical(logits=net(torch.randn(N, T, 3)))
        x, mask = p.sample(), torch.rand(N, T) < 0.8
        mask[:, 0] = True
        block, values = torch.arange(N) // 2, torch.randn(N, T)
        draws = sf.Draws(x, p.log_prob(x), values, credit=sf.RewardToGo(), mask=mask, block=block)
        baseline = sf.LeaveOneOut()(draws.signal(), draws)
        surrogate, params = sf.surrogate(draws, baseline=sf.Constant(baseline)), list(net.parameters())
        found = read_meters(surrogate, params, draws, baseline=baseline)
        halves = split_halves(surrogate, params, block=block)
        assert found == {
            "gradient cosine": halves.cosine,
            "gradient signal-to-noise": halves.signal_to_noise,
            "entropy": pytest.approx(-float(p.log_prob(x)[mask].detach().mean())),
            "baseline R2": explained_variance(draws.signal(), baseline, mask),
        }
        gradient = torch.autograd.grad(surrogate.mean(), params, retain_graph=True)
        assert read_meters(surrogate, params, draws, gradient=gradient)["gradient cosine"] == pytest.approx(
            halves.cosine
        )

    def test_off_policy_has_no_entropy(self):
        theta = torch.zeros(4, 1, requires_grad=True)
        draws = sf.Draws(
            torch.zeros(4), theta * torch.ones(4, 1), torch.randn(4, 1), behaviour_log_prob=torch.zeros(4, 1)
        )
        assert set(read_meters(sf.surrogate(draws), theta, draws)) == {"gradient cosine", "gradient signal-to-noise"}

    def test_one_step_problems(self):
        """The same meters for variational inference and search: any surrogate will do."""
        mean = torch.zeros(3, requires_grad=True)
        draws = sf.draw(Independent(Normal(mean, 1.0), 1), lambda x: x.square().sum(-1), 8)
        assert len(read_meters(sf.surrogate(draws), mean, draws, baseline=torch.zeros(8, 1))) == 4


THETA = torch.zeros(4, dtype=torch.float64, requires_grad=True)
VALUES = THETA * torch.arange(4.0)


def freed():
    surrogate, params = steps()
    surrogate.sum().backward()
    return surrogate, list(params)


REFUSED = [
    (lambda: gradient_noise(VALUES.sum(), THETA), "is a scalar, but one value per draw"),
    (lambda: gradient_noise(VALUES.detach(), THETA), "does not require grad, so it has no gradient"),
    (lambda: gradient_noise(VALUES, []), "no parameters to differentiate"),
    (lambda: gradient_noise(VALUES, [THETA, torch.zeros(2)]), r"Parameters \[1\] do not require grad"),
    (lambda: gradient_noise(VALUES[:1], THETA), r"There is 1 independent block of draws \(1 draws\)"),
    (lambda: gradient_noise(VALUES, THETA, block=torch.zeros(4, dtype=torch.long)), "1 independent block"),
    (
        lambda: gradient_noise(VALUES, THETA, block=torch.zeros(3, dtype=torch.long)),
        r"of shape \(3,\) on cpu, but for 4",
    ),
    (lambda: gradient_noise(VALUES, THETA, block=torch.zeros(4)), "block is torch.float"),
    (lambda: gradient_noise(VALUES * torch.nan, THETA), "gradient of some draws is NaN or infinite"),
    (lambda: gradient_noise(*freed()), "an earlier backward pass has freed it"),
    (lambda: split_halves(*freed()), "an earlier backward pass has freed it"),
    (lambda: split_halves(VALUES[:1], THETA), "1 independent block"),
    (lambda: split_halves(VALUES * torch.inf, THETA), "gradient of some draws is NaN or infinite"),
    (lambda: split_halves((VALUES, VALUES), THETA, gradient=[THETA]), "Two surrogates are two halves already"),
    (lambda: split_halves((VALUES, VALUES), THETA, block=torch.arange(4)), "Two surrogates are two halves already"),
    (
        lambda: split_halves(VALUES, THETA, gradient=[torch.zeros(3)]),
        r"gradient has shapes \[\(3,\)\], but params \[\(4",
    ),
    (
        lambda: read_meters(VALUES, THETA, drawn(torch.zeros(3, 1))),
        r"surrogate has shape \(4,\), but there are 3 draws",
    ),
    (lambda: explained_variance(torch.zeros(3, 2), torch.zeros(3)), r"baseline has shape \(3,\), but beside a signal"),
    (
        lambda: explained_variance(torch.zeros(3, 2), torch.zeros(3, 2), torch.ones(3) > 0),
        "one bool per value is needed",
    ),
    (lambda: explained_variance(torch.zeros(3), torch.zeros(3), torch.ones(3)), "mask is torch.float"),
    (lambda: explained_variance(torch.zeros(3), torch.zeros(3), torch.ones(3) < 0), "All of signal is masked"),
    (lambda: explained_variance(torch.zeros(3), torch.full((3,), torch.nan)), "baseline is nan in 3 of 3 present"),
    (lambda: explained_variance(torch.full((3,), torch.inf), torch.zeros(3)), "signal is inf in 3 of 3"),
    (
        lambda: mean_entropy(TransformedDistribution(Normal(torch.zeros(2), 1.0), TanhTransform())),
        "TransformedDistribution has no entropy in closed form",
    ),
    (lambda: mean_entropy(Normal(torch.zeros(2), 1.0), torch.ones(3) > 0), "one bool per value is needed"),
    (
        lambda: mean_entropy(Normal(torch.zeros(2), torch.tensor([0.0, 1.0]), validate_args=False)),
        "entropy is -inf in 1 of 2 present decisions",
    ),
    (
        lambda: mean_kl_divergence(Normal(torch.zeros(3), 1.0), Normal(torch.zeros(2, 3), 1.0)),
        r"previous has batch and event shapes \(\(3,\), \(\)\), but policy \(\(2, 3\), \(\)\)",
    ),
    (
        lambda: mean_kl_divergence(Beta(torch.ones(2), torch.ones(2)), Bernoulli(torch.ones(2) / 2)),
        r"KL\(Beta \|\| Bernoulli\) has no closed form",
    ),
    (
        lambda: mean_kl_divergence(*[Normal(torch.full((2,), torch.nan), 1.0, validate_args=False)] * 2),
        "The divergence is NaN at some steps",
    ),
    (lambda: policy_change(drawn(torch.zeros(3, 2)), torch.zeros(3)), r"log_prob has shape \(3,\), but the draws have"),
    (lambda: policy_change(drawn(torch.zeros(2, 1)), torch.full((2, 1), -torch.inf)), "log_prob is -inf in 2 of 2"),
    (
        lambda: policy_change(drawn(torch.zeros(2, 1), mask=torch.zeros(2, 1) > 0), torch.zeros(2, 1)),
        "All of log_prob is masked",
    ),
]


@pytest.mark.parametrize(("call", "message"), REFUSED)
def test_refusals(call, message):
    with pytest.raises(sf.ScorefnError, match=message):
        call()
