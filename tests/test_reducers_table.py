"""The table of reducers and the application that it adds: what they call exact is exact, and the program runs."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from pyro import poutine
from torch.distributions import Beta, Normal

import scorefn as sf
from applications.benchmarks.reducers import __main__ as program
from applications.benchmarks.reducers import closed_forms, variances
from applications.vi import capture_recapture as recapture
from tests.oracles.quadrature import gauss_hermite


def small(*, globals_last=False):
    """Two who were seen, three who may exist, two occasions, in float64, at a guide of no particular kind."""
    histories = recapture.Histories(torch.tensor([[1.0, 0.0], [1.0, 1.0]]).double(), 3)
    net = recapture.CaptureRecapture(histories, globals_last=globals_last)
    net.parameters.double()
    generator = torch.Generator().manual_seed(0)
    for parameter in net.parameters.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return net


def test_the_data():
    histories = recapture.load()
    assert histories.seen.shape == (87, 3)
    assert histories.unseen == 150
    assert histories.seen.any(-1).all()
    assert 3 * (len(histories.seen) + histories.unseen) == 237 * 3


def test_what_is_exact_agrees_with_the_published_reference():
    answers = recapture.exact(recapture.load())
    assert answers.log_evidence == pytest.approx(-247.455204803, abs=1e-8)
    assert answers.expected_number == pytest.approx(100.2072, abs=5e-5)
    assert answers.optimum == pytest.approx(-247.849293, abs=1e-6)


def test_the_optimum_is_stationary():
    net = recapture.CaptureRecapture(recapture.load())
    net.to_optimum()
    net.parameters.double()
    gradient = torch.autograd.grad(net.exact_bound(), list(net.parameters.parameters()))
    assert all(g.abs().max() < 1e-3 for g in gradient)


@pytest.mark.filterwarnings("default")
def test_the_log_joint_is_that_of_each_capture_in_turn():
    """Individual by individual and catch by catch; the ways to be caught k times of T are counted apart."""
    net = small()
    omega, p = torch.tensor(0.4).double(), torch.tensor(0.7).double()
    for bits in itertools.product([0.0, 1.0], repeat=3):
        z = torch.tensor(bits).double()
        values = {"omega": omega, "p": p, "z": z}
        trace = poutine.trace(poutine.condition(net.model, data=values)).get_trace()
        expected = math.log(math.comb(2, 1)) + 2 * omega.log() + 3 * p.log() + (1 - p).log()
        for bit in bits:
            expected = expected + (omega.log() + 2 * (1 - p).log() if bit else (1 - omega).log())
        assert trace.log_prob_sum() == pytest.approx(expected.item(), abs=1e-6)


def test_the_evidence_by_quadrature():
    net = small()
    grid = (torch.arange(400, dtype=torch.float64) + 0.5) / 400
    omega, p = grid[:, None], grid[None, :]
    seen = 2 * omega**2 * p**3 * (1 - p)
    likelihood = seen * (omega * (1 - p) ** 2 + 1 - omega) ** 3
    assert recapture.exact(net.histories).log_evidence == pytest.approx(likelihood.mean().log().item(), abs=1e-4)


def test_the_closed_bound_is_what_both_programs_estimate():
    """Three times within 5 standard errors: a false alarm in half a million."""
    net = small()
    exact = net.exact_bound().item()
    torch.manual_seed(0)
    by_hand = net.draws(200_000).fx.sum(-1)
    assert (by_hand.mean() - exact).abs() < 5 * by_hand.std() / len(by_hand) ** 0.5
    for last in (False, True):
        program = small(globals_last=last)
        fx = sf.posteriors.ScoreFunctionELBO(20_000, max_plate_nesting=1).draws(program.model, program.guide).fx.sum(-1)
        assert (fx.mean() - exact).abs() < 5 * fx.std() / len(fx) ** 0.5


def test_the_influence_that_is_stated_by_hand_is_true():
    """Move one decision: the values that change are those that it is said to influence."""
    net = small()
    draws = net.draws(4)
    betas = [Beta(*value.exp()) for value in (net.parameters.omega, net.parameters.p)]
    mask = draws.credit.mask
    assert mask.shape == (5, draws.fx.shape[1])

    def values(x):
        """The factors of one state, written out."""
        omega, p, z = x[0], x[1], x[2:]
        own = [
            2 * omega.log() - betas[0].log_prob(omega),
            math.log(2) + 3 * p.log() + (1 - p).log() - betas[1].log_prob(p),
        ]
        logits = net.parameters.logits
        exists = [omega.log() if bit else (1 - omega).log() for bit in z]
        guide = [-(bit * logit - torch.nn.functional.softplus(logit)) for bit, logit in zip(z, logits, strict=True)]
        missed = [2 * bit * (1 - p).log() for bit in z]
        return torch.stack([*own, *exists, *guide, *missed])

    for n in range(4):
        x = torch.cat([draws.x["omega"][n, None], draws.x["p"][n, None], draws.x["z"][n]])
        torch.testing.assert_close(values(x), draws.fx[n])
        for k in range(5):
            moved = x.clone()
            moved[k] = 1 - x[k] if k > 1 else 0.9 * x[k]
            assert ((values(moved) != values(x)) <= mask[k]).all()


def test_a_fit_climbs():
    seen = []
    fitted = recapture.fit(0, 120, seen.append)
    assert [point.step for point in seen] == list(range(2, 121, 2))
    assert seen[-1].gap < 0.5 * seen[0].gap
    assert fitted.steps_within(1e9) == 2
    stopped = recapture.fit(0, 120, should_stop=lambda: True)
    assert stopped.curve[-1].step == 1


def test_variances_of_a_known_problem():
    """d/dm of E x^2: the table's own draws, by the formula of each estimator; and what the page says of the formula."""
    nodes, weight = gauss_hermite(10)
    f = {
        "no baseline": (lambda x: x.square() * (x - 1), 30),
        "Constant(E f)": (lambda x: (x.square() - 2) * (x - 1), 18),
        "pathwise, for comparison": (lambda x: 2 * x, 4),
    }
    for gradient, exact in f.values():
        mean = weight @ gradient(1 + nodes)
        assert mean == pytest.approx(2, rel=1e-12)
        assert weight @ (gradient(1 + nodes) - mean).square() == pytest.approx(exact, rel=1e-12)

    problem = closed_forms.gaussian()
    estimates = {"leave-one-out": problem.estimates["leave-one-out"], **{name: problem.estimates[name] for name in f}}
    torch.manual_seed(0)
    found = {row.name: row for row in variances.rows(replace(problem, estimates=estimates), 50, 0)}
    torch.manual_seed(0)
    one = torch.ones((), dtype=torch.float64)
    deviations = {name: [] for name in f}
    for _ in range(50):  # the estimators take turns
        Normal(one, 1.0).sample((64,))
        for name, (gradient, _) in f.items():
            p = Normal(one, 1.0)
            x = p.rsample((64,)) if name.startswith("pathwise") else p.sample((64,))
            deviations[name].append(gradient(x).mean() - 2)
    for name, each in deviations.items():
        deviation = torch.stack(each)
        value, low, high = found[name].variance["the mean"]
        assert low < value < high
        assert value == pytest.approx(deviation.square().mean().item(), rel=1e-10)
        error = deviation.mean().abs() / (deviation.square().mean() / 50).sqrt()
        assert found[name].error["the mean"] == pytest.approx(error.item(), rel=1e-8)
    assert found["leave-one-out"].ratio["the mean"] == (1.0, 1.0, 1.0)


def test_the_quick_run(tmp_path, capsys):
    out = tmp_path / "reducers.md"
    assert program.main(["--quick", "--out", str(out)]) == 0
    page = out.read_text(encoding="utf-8")
    assert page.count("\n## ") == 18
    assert "nan" not in page
    assert "| AdaptiveRaoBlackwell |" in page
    assert page.startswith("# What each reducer saves\n")
