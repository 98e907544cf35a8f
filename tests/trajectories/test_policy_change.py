"""Entropy, divergence and how far a policy has moved."""

import itertools

import pytest
import torch
from torch.distributions import Categorical, Independent, Normal

from scorefn.trajectories import mean_entropy, mean_kl_divergence, policy_change
from tests.trajectories.meter_cases import NEW, OLD, drawn

pytestmark = pytest.mark.usefixtures("float64")


class TestEntropy:
    def test_closed_form(self):
        logits = torch.randn(3, 4, 5)
        mask = torch.rand(3, 4) < 0.7
        by_step = -(logits.log_softmax(-1) * logits.softmax(-1)).sum(-1)
        assert mean_entropy(Categorical(logits=logits)) == pytest.approx(float(by_step.mean()), rel=1e-14)
        assert mean_entropy(Categorical(logits=logits), mask) == pytest.approx(float(by_step[mask].mean()), rel=1e-14)


class TestDivergence:
    def test_closed_form(self):
        m, s = torch.randn(2, 3, 4, 2), torch.rand(2, 3, 4, 2) + 0.5
        mask = torch.rand(3, 4) < 0.7
        by_step = ((s[1] / s[0]).log() + (s[0] ** 2 + (m[0] - m[1]) ** 2) / (2 * s[1] ** 2) - 0.5).sum(-1)
        previous, policy = (Independent(Normal(m[i], s[i]), 1) for i in range(2))
        assert mean_kl_divergence(previous, policy) == pytest.approx(float(by_step.mean()), rel=1e-12)
        assert mean_kl_divergence(previous, policy, mask) == pytest.approx(float(by_step[mask].mean()), rel=1e-12)

    def test_excluded_outcomes(self):
        previous, policy = Categorical(probs=torch.tensor([0.5, 0.5])), Categorical(probs=torch.tensor([1.0, 0.0]))
        assert mean_kl_divergence(previous, policy) == float("inf")


class TestPolicyChange:
    def test_expectation_and_standard_error_by_enumeration(self):
        truth = float((OLD * (OLD / NEW).log()).sum())
        first = second = error = 0.0
        for x in itertools.product(range(3), repeat=3):
            x = torch.tensor(x)
            weight = float(OLD[x].prod())
            found = policy_change(drawn(OLD[x].log().unsqueeze(-1)), NEW[x].log().unsqueeze(-1))
            first, second = first + weight * found.kl, second + weight * found.kl**2
            error += weight * found.standard_error**2
        assert first == pytest.approx(truth, abs=1e-14)
        assert error == pytest.approx(second - first**2, abs=1e-14)

    def test_steps_masks_and_blocks(self):
        old, new, mask = torch.randn(4, 3), torch.randn(4, 3), torch.rand(4, 3) < 0.6
        mask[:, 0] = True
        block = torch.tensor([0, 1, 1, 2])
        draws = drawn(old.where(mask, torch.nan), mask=mask, block=block)
        found = policy_change(draws, new.where(mask, torch.nan))
        k3 = ((new - old).exp() - 1 - (new - old)).where(mask, 0.0)
        kl = float(k3.sum() / mask.sum())
        residuals = [(k3 - kl * mask)[block == b].sum() for b in range(3)]
        assert found.kl == pytest.approx(kl, rel=1e-12)
        assert found.standard_error == pytest.approx(float((1.5 * sum(r**2 for r in residuals)).sqrt() / mask.sum()))

    def test_is_from_what_was_sampled(self):
        old, new, behaviour = torch.randn(3, 4, 1).unbind(0)
        draws = drawn(old, behaviour_log_prob=behaviour)
        assert policy_change(draws, new) == policy_change(drawn(behaviour), new)
        assert policy_change(draws, behaviour) == (0.0, 0.0)

    def test_one_draw_has_no_standard_error(self):
        found = policy_change(drawn(torch.zeros(1, 3)), torch.ones(1, 3))
        assert found.kl == pytest.approx(torch.e - 2)
        assert found.standard_error != found.standard_error

    def test_is_exact_for_a_small_change_in_single_precision(self):
        old = torch.zeros(2, 1, dtype=torch.float32)
        assert policy_change(drawn(old), old + 1e-4).kl == pytest.approx(0.5e-8, rel=1e-4)
