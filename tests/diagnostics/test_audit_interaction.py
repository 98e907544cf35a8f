"""Draws that interact through single rows, of small supports; draws and behaviours that do not belong together."""

import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Independent, Normal

import scorefn as sf
from scorefn.diagnostics import AuditReport, audit
from scorefn.diagnostics.audits.interaction import _apart, _companions

FAST = {"repeats": 64, "baseline": None}  # no long sampling tests: only replays are looked at


def names(report: AuditReport) -> list[str]:
    return [finding.name for finding in report.findings]


def bits() -> tuple[Bernoulli, Tensor]:
    logits = torch.tensor([0.3, -0.5, 1.0], dtype=torch.float64, requires_grad=True)
    return Bernoulli(logits=logits), logits


def square(x: Tensor) -> Tensor:
    return (x.sum(-1) - 1.2).square()


def last_reads_its_neighbour(x: Tensor) -> Tensor:
    only = torch.zeros(len(x), dtype=x.dtype)
    only[-1] = x[-2].sum()
    return square(x) + only


READS: dict[str, Callable[[Tensor], Tensor]] = {
    "the first row": lambda x: square(x) + x[0].sum(),
    "the last row": lambda x: square(x) + x[-1].sum(),
    "the last but one": lambda x: square(x) + x[-2].sum(),
    "the middle row": lambda x: square(x) + x[len(x) // 2].sum(),
    "the row above": lambda x: square(x) + x.roll(1, 0).sum(-1),
    "by the last, its neighbour": last_reads_its_neighbour,
}


@pytest.mark.parametrize("num_samples", [2, 8, 16])
@pytest.mark.parametrize("kind", READS)
def test_one_row_that_others_read_is_always_found(kind: str, num_samples: int) -> None:
    p, logits = bits()
    for seed in range(12):
        torch.manual_seed(seed)
        assert "interacting draws" in names(audit(p, READS[kind], logits, num_samples=num_samples, **FAST))


def test_one_problem_that_others_read_is_always_found() -> None:
    p, logits = bits()

    def f(x: Tensor) -> Tensor:
        return x + torch.tensor([0.0, 1.0, 0.0], dtype=x.dtype) * x[:, 2:]

    for seed in range(12):
        torch.manual_seed(seed)
        assert "interacting problems" in names(audit(p, f, logits, **FAST))


@pytest.mark.parametrize("n", [2, 3, 8, 13, 64])
def test_every_round_parts_every_pair_both_ways(n: int) -> None:
    parted: dict[int, Tensor] = {}
    for number, keep in _apart(n):
        parted[number] = parted.get(number, torch.zeros(n, n)) + torch.outer(keep.float(), 1 - keep.float())
    assert len(parted) >= 3
    for pairs in parted.values():
        assert ((pairs > 0) | torch.eye(n, dtype=torch.bool)).all()


def test_replacements_differ_where_they_can() -> None:
    x = torch.tensor([[0.0], [1.0], [1.0], [0.0]])
    for _ in range(20):
        assert torch.equal(_companions(x, torch.tensor([[0.0], [1.0], [1.0], [1.0]]), alike=False), 1 - x)
    assert torch.equal(_companions(x, x[:1], alike=False), torch.zeros(4, 1))
    alike = _companions(x, torch.arange(5.0).reshape(5, 1), alike=True)
    assert len(alike.unique()) == 1


def test_many_draws_take_few_settings() -> None:
    assert sum(1 for _ in _apart(10_000)) <= 100
    p, logits = bits()
    start = time.process_time()
    assert audit(p, square, logits, num_samples=2000)
    assert time.process_time() - start < 20


def test_a_value_that_was_never_drawn_is_no_finding() -> None:
    """Rare values: 16,384 draws without one of probability 6e-6 say nothing."""
    logits = torch.full((3,), -4.0, requires_grad=True)
    p = Independent(Bernoulli(logits=logits), 1)
    for seed in range(5):
        torch.manual_seed(seed)
        report = audit(p, lambda x: x.sum(-1), logits)
        assert report, report


def test_a_score_that_is_balanced_by_an_event_that_was_not_met() -> None:
    logits = torch.tensor([-12.0, 0.0], dtype=torch.float64, requires_grad=True)
    p = Independent(Bernoulli(logits=logits), 1)
    for seed in range(3):
        torch.manual_seed(seed)
        report = audit(p, lambda x: x.sum(-1), logits)
        assert report, report
        torch.manual_seed(seed)
        assert audit(bits()[0], square, repeats=16)


def test_a_value_that_is_never_drawn_though_it_is_likely_is_a_finding() -> None:
    class Never(Bernoulli):
        def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
            return torch.zeros(*sample_shape, *self.batch_shape)

    logits = torch.full((1,), -4.0, requires_grad=True)
    report = audit(Independent(Never(logits=logits), 1), lambda x: x.sum(-1), logits)
    assert "draws at other frequencies than their probabilities" in names(report)


def test_draws_without_weights_from_another_behaviour() -> None:
    mean = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    p = Independent(Normal(mean, 1.0), 1)
    behaviour = Independent(Normal(torch.full((2,), 0.5, dtype=torch.float64), 1.0), 1)
    draws = sf.draw(p, square, 50)
    assert draws.behaviour_log_prob is None
    report = audit(p, square, draws=draws, behaviour=behaviour)
    assert names(report) == ["behaviour log-probability"]
    (finding,) = report.findings
    assert "no behaviour_log_prob" in finding.fact
    assert "no importance weights" in finding.reason
    assert "behaviour_log_prob" in finding.repair
    assert finding.evidence["largest difference"] == pytest.approx(
        float((draws.log_prob.detach() - behaviour.log_prob(draws.x).reshape(draws.log_prob.shape)).abs().max())
    )
    same = audit(p, square, draws=draws, behaviour=Independent(Normal(mean.detach().clone(), 1.0), 1))
    assert same, same
    assert "without weights" in same.checked["behaviour log-probability"]
