"""Supports that move, samplers that are not what is scored, behaviours, programs: each fault is found, by its name."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Exponential, Independent, Normal, Uniform

import scorefn as sf
from scorefn.diagnostics import audit
from tests.diagnostics.test_audit_faults import names, normal, square

# ------------------------------------------------------------------------------------------------ supports and samplers


class Custom:
    """Something that samples, and something that scores, without any declaration."""

    def __init__(self, sample: Callable[[torch.Size], Tensor], log_prob: Callable[[Tensor], Tensor]) -> None:
        self.sample, self.log_prob = sample, log_prob


def moving(theta: Tensor) -> Custom:
    return Custom(lambda shape: torch.rand(shape) * theta.detach(), lambda x: -theta.log().expand(x.shape))


def shifted(theta: Tensor) -> Custom:
    return Custom(
        lambda shape: Exponential(1.0).sample(shape) + theta.detach(), lambda x: Exponential(1.0).log_prob(x - theta)
    )


def clipped(theta: Tensor) -> Custom:
    p = Normal(theta, 1.0)
    return Custom(lambda shape: p.sample(shape).clamp(-0.5, 1.0), p.log_prob)


def unnormalised(theta: Tensor) -> Custom:
    return Custom(Normal(theta.detach(), 1.0).sample, lambda x: -0.5 * (x - theta).square() + theta * 0.3)


def tempered(theta: Tensor) -> Custom:
    logits = torch.stack([theta, 0.5 * theta, -theta])
    return Custom(Categorical(logits=2 * logits.detach()).sample, Categorical(logits=logits).log_prob)


@pytest.mark.parametrize("make", [moving, shifted, clipped, unnormalised, tempered])
def test_a_measure_whose_scores_do_not_average_to_zero(make: Callable[[Tensor], Custom]) -> None:
    theta = torch.tensor(1.5, requires_grad=True)
    report = audit(make(theta), lambda x: x * 1.0, theta)
    assert names(report) == ["scores that do not average to zero"]


def test_the_score_of_a_uniform_is_a_constant() -> None:
    theta = torch.tensor(2.0, requires_grad=True)
    report = audit(Uniform(0.0, theta), lambda x: x.square(), theta)
    assert names(report) == ["support that moves", "scores that do not average to zero"]
    assert report.findings[1].evidence["mean"] == pytest.approx(-0.5, rel=1e-6)


class Loaded(Categorical):
    """Draws other frequencies than it scores."""

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return torch.randint(3, sample_shape)


def test_frequencies_that_are_not_the_probabilities() -> None:
    logits = torch.tensor([0.5, 0.0, -0.5], requires_grad=True)
    found = names(audit(Loaded(logits=logits), lambda x: x.float()))
    assert "draws at other frequencies than their probabilities" in found


class Unnormalised(Bernoulli):
    def log_prob(self, value: Tensor) -> Tensor:
        return value * self.logits


def test_probabilities_that_do_not_add_up_to_one_are_found_exactly() -> None:
    logits = torch.tensor([0.5, 0.0], requires_grad=True)
    report = audit(Unnormalised(logits=logits), lambda x: x.sum(-1))
    found = {finding.name: finding for finding in report.findings}["probabilities that do not add up to one"]
    assert found.evidence["largest |sum - 1|"] == pytest.approx(float(logits.detach().exp().max()), rel=1e-6)


# ---------------------------------------------------------------------------------------------------------- behaviour


def recorded(claim: Callable[[Tensor], Tensor], n: int = 4000) -> tuple[Independent, Independent, sf.Draws]:
    """Draws of a behaviour near p, with what somebody wrote down as its log-probability."""
    p, mean = normal(2)
    behaviour = Independent(Normal(mean.detach() + 0.1, 1.2), 1)
    x = behaviour.sample((n,))
    draws = sf.Draws(
        x, p.log_prob(x).unsqueeze(-1), square(x).unsqueeze(-1), behaviour_log_prob=claim(x).detach().unsqueeze(-1)
    )
    return p, behaviour, draws


BEHAVIOUR = Independent(Normal(torch.tensor([-0.4, 0.6]), 1.2), 1)
CLAIMS: dict[str, Callable[[Tensor], Tensor]] = {
    "of the clipped action": lambda x: BEHAVIOUR.log_prob(x.clamp(-1.0, 1.0)),
    "of another temperature": lambda x: BEHAVIOUR.log_prob(x) / 2,
    "without the event sum": lambda x: BEHAVIOUR.base_dist.log_prob(x)[:, 0],
    "with the Jacobian of tanh": lambda x: BEHAVIOUR.log_prob(x) - (1 - x.tanh().square()).log().sum(-1),
}


@pytest.mark.parametrize("kind", CLAIMS)
def test_a_behaviour_log_probability_that_is_not_the_samplers(kind: str) -> None:
    p, behaviour, draws = recorded(CLAIMS[kind])
    exact = audit(p, square, draws=draws, behaviour=behaviour)
    assert "behaviour log-probability" in names(exact)
    found = names(audit(p, square, draws=draws))
    assert set(found) <= {"importance ratios"}  # a test may lack terms, which it then says
    if not found:
        assert "importance ratios" in audit(p, square, draws=draws).unchecked
    assert found or kind in {"of another temperature", "without the event sum", "with the Jacobian of tanh"}


def test_ratios_are_tested_per_decision_where_present() -> None:
    mean = normal(2)[1]
    x = torch.randn(3000, 2) + 0.1
    log_prob = Normal(mean, 1.0).log_prob(x)
    mask = torch.rand(3000, 2) < 0.7
    mask[:, 0] = True
    claimed = Normal(0.1, 1.0).log_prob(x)

    def draws(claim: Tensor) -> sf.Draws:
        return sf.Draws(x, log_prob, square(x).unsqueeze(-1), behaviour_log_prob=claim, mask=mask)

    class Fixed:
        def draws(self, f: Any, num_samples: int, *, coupling: Any = None) -> sf.Draws:
            return draws(claimed)

    wrong = claimed + torch.where(mask, -0.4, 0.0)
    assert names(audit(Fixed(), square, draws=draws(claimed), baseline=None)) == []
    assert names(audit(Fixed(), square, draws=draws(wrong), baseline=None)) == ["importance ratios"]


def test_a_support_that_the_behaviour_does_not_cover() -> None:
    p, mean = normal(1)
    behaviour = Independent(Uniform(torch.tensor([-1.0]), torch.tensor([1.0]), validate_args=False), 1)
    found = names(audit(p, square, mean, behaviour=behaviour))
    assert found == ["support that the behaviour does not cover"]


# ------------------------------------------------------------------------------------------------------------ programs


def test_claimed_dependencies_that_are_false() -> None:
    def program(ledger: sf.tracking.Ledger) -> None:
        a = ledger.decision("a", torch.randn(()), given=())
        b = ledger.decision("b", torch.randn(()) + a, given=a)
        ledger.value("first", a.square())
        ledger.value("second", a * b)

    p, mean = normal()
    right = torch.tensor([[True, True], [False, True]])
    wrong = torch.tensor([[True, False], [False, True]])
    assert audit(p, square, mean, program=program, claimed=right)
    report = audit(p, square, mean, program=program, claimed=wrong)
    assert names(report) == ["claimed dependencies"]
    assert "'second'" in report.findings[0].fact
    assert "'a'" in report.findings[0].fact
