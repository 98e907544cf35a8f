"""What the programs of variational inference share: a watched fit, importance sampling, gradients in one vector."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from applications.gradients import flat, flat_grad
from applications.vi.correction import corrected, pyro_log_weights, summary
from applications.vi.fitting import Progress, arrival, ascend, decaying, show, watched
from scorefn.posteriors import ScoreFunctionELBO, diagnose


def test_a_watched_fit_notes_bound_gap_and_others():
    value, seen = torch.zeros(1, requires_grad=True), []

    def step():
        value.data += 1

    curve = watched(step, 10, lambda: 2 * value, 25.0, seen.append, others=lambda: {"half": value.item() / 2}, marks=5)
    assert curve == seen
    assert [(p.step, p.steps, p.bound, p.gap, p.others) for p in curve[:2]] == [
        (2, 10, 4.0, 21.0, {"half": 1.0}),
        (4, 10, 8.0, 17.0, {"half": 2.0}),
    ]
    stopped = watched(step, 10, value.sum, 0.0, marks=1, should_stop=lambda: value.item() == 13)
    assert [p.step for p in stopped] == [3]


@pytest.mark.parametrize(("gaps", "step"), [((3, 0.5, 2, 0.5, 0.1), 4), ((0.1, 0.2), 1), ((0.1, 2), None), ((), None)])
def test_arrival_is_where_it_stays(gaps, step):
    curve = [Progress(number, 9, -gap, gap, 0.0, {}) for number, gap in enumerate(gaps, 1)]
    found = arrival(curve, 1.0)
    assert (found and found.step) == step


def test_a_line_names_everything(capsys):
    show(Progress(3, 3, -1.25, 0.5, 2.0, {"E[N]": 100.0}))
    out = capsys.readouterr().out
    assert out.endswith("\n")
    assert all(text in out for text in ("step     3 of 3", "-1.2500", "0.50000", "E[N] 100.0000", "2.0 s CPU"))


def test_the_learning_rate_decays_to_its_share():
    parameter = torch.zeros(1, requires_grad=True)
    optim = pyro.optim.clipped_adam.ClippedAdam([parameter], **decaying(50, 0.2, 0.01))
    for _ in range(50):
        parameter.grad = torch.ones(1)
        optim.step()
    assert optim.param_groups[0]["lr"] == pytest.approx(0.002, rel=1e-9)


def test_ascent_finds_the_top_of_a_parabola():
    x = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    top = torch.tensor([3.0, -2.0], dtype=torch.float64)
    ascend([x], lambda: -(x - top).square().sum())
    torch.testing.assert_close(x.detach(), top, rtol=0, atol=1e-9)
    assert x.grad is None


def test_gradients_in_one_vector():
    a, b = torch.ones(2, 2, requires_grad=True), torch.ones(3, requires_grad=True)
    (2 * a).sum().backward()
    assert flat_grad([a, b]).tolist() == [2, 2, 2, 2, 0, 0, 0]
    found = flat([a, b])
    assert found.shape == (7,)
    assert not found.requires_grad


def model():
    z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.25)))
    pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.5))


def guide():
    pyro.sample("z", dist.Bernoulli(logits=pyro.param("logit", torch.tensor(-math.log(3.0)))))


def test_an_exact_guide_has_the_evidence_as_every_weight():
    pyro.clear_param_store()
    log_evidence = dist.Normal(0.0, 1.0).log_prob(torch.tensor(0.5)).item()  # z = 0 and 1 explain x = 1/2 alike
    weights = pyro_log_weights(model, guide, 70, together=32)
    assert weights.shape == (70,)
    torch.testing.assert_close(weights, torch.full((70,), log_evidence))
    assert len(pyro.get_param_store()) == 0
    found = corrected(weights)
    assert (found.draws, found.log_evidence) == (70, pytest.approx(log_evidence, abs=1e-6))
    assert found.log_evidence_error == pytest.approx(0, abs=1e-6)
    assert "from 70 draws -1.0439" in str(found)
    told = summary(diagnose(ScoreFunctionELBO(4), model, guide, num_draws=100, repeats=2))
    assert told["corrected_log_evidence"] == pytest.approx(log_evidence, abs=1e-6)
    assert set(told["gradient_snr"]) == {"z"}
