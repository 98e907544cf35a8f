"""Bound and evidence against the same numbers in closed form, and against known posteriors."""

import itertools
import math

import pytest
import torch
from torch.distributions import HalfCauchy, Normal

import scorefn as sf
from scorefn.posteriors import bound, evidence, pareto_k, psis


def test_the_formulas():
    w = torch.tensor([1.0, 3.0, 0.5, 2.0], dtype=torch.float64)
    found = evidence(w.log())
    assert found.value.item() == pytest.approx(math.log(w.mean().item()), abs=1e-14)
    assert found.standard_error.item() == pytest.approx((w.std() / 2 / w.mean()).item(), rel=1e-12)
    assert found.effective_sample_size.item() == pytest.approx((w.sum() ** 2 / w.square().sum()).item(), rel=1e-12)
    mean = bound(w.log())
    assert mean.value.item() == pytest.approx(w.log().mean().item(), rel=1e-12)
    assert mean.standard_error.item() == pytest.approx((w.log().std() / 2).item(), rel=1e-12)


def test_the_weight_of_evidence_is_unbiased_and_so_are_both_variances():
    """Three states, all pairs of draws: E mean w = Z, E s^2/S = Var mean w, E of the bound's alike."""
    q = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    log_w = torch.tensor([-1.0, 0.4, -0.3], dtype=torch.float64)
    moments = torch.zeros(4, dtype=torch.float64)
    for pair in itertools.product(range(3), repeat=2):
        x = log_w[list(pair)]
        found, mean = evidence(x), bound(x)
        weight = found.value.exp()
        values = [weight, (found.standard_error * weight) ** 2, mean.value, mean.standard_error**2]
        moments += q[pair[0]] * q[pair[1]] * torch.stack(values)
    z, elbo = q @ log_w.exp(), q @ log_w
    exact = [z, (q @ log_w.exp() ** 2 - z**2) / 2, elbo, (q @ log_w**2 - elbo**2) / 2]
    torch.testing.assert_close(moments, torch.stack(exact), rtol=1e-12, atol=0)


def test_problems_are_kept_apart_and_huge_weights_do_not_overflow():
    log_weights = torch.tensor([[0.0, 1000.0], [math.log(3.0), 1000.0 + math.log(3.0)]])
    found = evidence(log_weights)
    torch.testing.assert_close(found.value, torch.tensor([0.0, 1000.0]).double() + math.log(2.0), rtol=1e-6, atol=0)
    torch.testing.assert_close(found.standard_error, torch.tensor([0.5, 0.5]).double(), rtol=1e-4, atol=0)
    torch.testing.assert_close(found.effective_sample_size, torch.tensor([1.6, 1.6]).double(), rtol=1e-4, atol=0)


def test_a_draw_outside_the_support_has_no_weight_and_ends_the_bound():
    log_weights = torch.tensor([0.0, 0.0, -math.inf, 0.0])
    found = evidence(log_weights)
    assert found.value.item() == pytest.approx(math.log(0.75))
    assert found.effective_sample_size.item() == pytest.approx(3.0)
    assert bound(log_weights).value.item() == -math.inf


def test_the_exact_posterior_as_guide_has_no_error():
    found = evidence(torch.full((50,), -2.5))
    assert found.value.item() == -2.5
    assert found.standard_error.item() == 0
    assert found.effective_sample_size.item() == pytest.approx(50)


@pytest.mark.parametrize("size", [1e308, 1e150, 1e-100])
def test_numbers_of_any_size(size):
    """Half the weights count for nothing beside the others; squares and sums of their logarithms would overflow."""
    found = bound([size, -size] * 20)
    assert found.value.item() == 0
    assert found.standard_error.item() == pytest.approx(size / math.sqrt(39), rel=1e-14)
    assert bound([size] * 40).value.item() == pytest.approx(size, rel=1e-14)
    if size > 1:
        found = evidence([size, -size] * 20)
        assert found.value.item() == size  # log 2 is below its last digit
        assert found.effective_sample_size.item() == pytest.approx(20, rel=1e-14)
        assert found.standard_error.item() == pytest.approx(1 / math.sqrt(39), rel=1e-14)


def test_problems_of_different_sizes_do_not_disturb_each_other():
    small = torch.tensor([1e-100, 3e-100], dtype=torch.float64)
    both = bound(torch.stack([1e308 * torch.ones(2, dtype=torch.float64), small], 1))
    assert both.value.tolist() == pytest.approx([1e308, 2e-100], rel=1e-14)
    assert both.standard_error[1].item() == bound(small).standard_error.item()


def test_a_weight_of_zero_makes_the_bound_infinite():
    for size in (1.0, 1e308):
        found = bound([size] * 20 + [-math.inf])
        assert found.value.item() == -math.inf
        assert not math.isfinite(found.standard_error.item())


def test_refusals():
    for measured in (bound, evidence):
        with pytest.raises(sf.ScorefnError, match="There is 1 log weight"):
            measured([0.3])
        with pytest.raises(sf.NonFiniteError, match=r"nan at 1 of 2 draws, namely \[1\]"):
            measured([0.3, math.nan])


Y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
SIGMA = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def eight_schools(z):
    """log p of the non-centred model, z = (mu, log tau, eta) `[N, 10]`."""
    mu, tau, eta = z[:, 0], z[:, 1].exp(), z[:, 2:]
    prior = (
        Normal(0.0, 5.0).log_prob(mu) + HalfCauchy(5.0).log_prob(tau) + z[:, 1] + Normal(0.0, 1.0).log_prob(eta).sum(1)
    )
    return prior + Normal(mu.unsqueeze(1) + tau.unsqueeze(1) * eta, SIGMA).log_prob(Y).sum(1)


def test_eight_schools():
    """Mean-field bound -31.5985 +- .0014 and log evidence -31.311347352, both by quadrature.

    The bound is met within 5 standard errors (a false alarm in 1.7 million) and the .0014. The evidence has no standard
    error to go by where k-hat is above 1/2: at least nine tenths of the gap must be gone.
    """
    loc, log_scale = torch.zeros(10, requires_grad=True), torch.zeros(10, requires_grad=True)
    optimizer = torch.optim.Adam([loc, log_scale], lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1500)
    for _ in range(1500):
        optimizer.zero_grad()
        q = Normal(loc, log_scale.exp())
        z = q.rsample((32,))
        (-(eight_schools(z) - q.log_prob(z).sum(1)).mean()).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        q = Normal(loc, log_scale.exp())
        z = q.sample((200_000,))
        log_weights = eight_schools(z) - q.log_prob(z).sum(1)
    reached, smoothed = bound(log_weights), psis(log_weights)
    assert reached.value.item() == pytest.approx(-31.5985, abs=5 * reached.standard_error.item() + 0.0014)
    assert reached.standard_error.item() < 0.003
    corrected = evidence(smoothed.log_weights)
    assert corrected.value.item() == pytest.approx(-31.311347, abs=0.1 * (31.5985 - 31.311347))
    assert 0.5 < pareto_k(log_weights).item() < 1
