"""Couplings of the user's on enumerated draws: what they make of their draws is what is certified."""

import math
from functools import partial

import pytest
import torch
import torch.distributions as td

import scorefn as sf
from scorefn.diagnostics import check_unbiased

pytestmark = pytest.mark.usefixtures("float64")


class Paired:
    """Each draw and its mirror image."""

    unbiased = True

    def __init__(self, mirror):
        self.mirror = mirror

    def sample(self, p, num_samples):
        x = p.sample((num_samples // 2,))
        return (
            torch.stack([x, self.mirror(p, x)], 1).flatten(0, 1),
            torch.arange(num_samples // 2).repeat_interleave(2),
        )


class Made:
    """What a function makes of N draws."""

    unbiased = True

    def __init__(self, make):
        self.make = make

    def sample(self, p, num_samples):
        return self.make(p.sample((num_samples,))), None


def report_of(p, f, num_samples, coupling, parameter):
    return check_unbiased((p, f, partial(sf.expectation, num_samples=num_samples, coupling=coupling)), params=parameter)


def around_the_mean(p, x):
    return 2 * p.mean.detach() - x


@pytest.mark.parametrize("num_samples", [4, 2])
@pytest.mark.parametrize("event", [0, 1])
def test_a_mirrored_normal_is_certified(num_samples, event):
    m = torch.full((event,) if event else (), 0.3).requires_grad_()
    p = td.Independent(td.Normal(m, 1.0), event) if event else td.Normal(m, 1.0)
    f = (lambda x: x.square().sum(-1)) if event else torch.square
    report = report_of(p, f, num_samples, Paired(around_the_mean), m)
    assert (report.verdict, report.method) == ("unbiased", "exact")
    if num_samples == 2:  # 2 (x^2 z + x'^2 z') / 2 = 2 m z^2: its variance is 8 m^2
        torch.testing.assert_close(report.variance, torch.tensor([8 * 0.09]))


def test_a_mirror_image_of_another_law_is_found():
    """1 - x is distributed as x where the bit is fair, and nowhere else."""
    flip = Paired(lambda p, x: 1 - x)
    for level, verdict in ((0.0, "unbiased"), (0.3, "biased")):
        logit = torch.tensor(level, requires_grad=True)
        for num_samples in (2, 4):
            report = report_of(td.Bernoulli(logits=logit), lambda x: 1 + x, num_samples, flip, logit)
            assert (report.verdict, report.method) == (verdict, "exact")


def test_what_a_coupling_makes_of_n_draws_is_not_taken_for_the_draws():
    logit = torch.tensor(0.3, requires_grad=True)
    p = td.Bernoulli(logits=logit)
    found = [report_of(p, lambda x: 1 + x, 2, Made(make), logit) for make in (torch.clone, lambda x: x[:1].expand(2))]
    assert [(r.verdict, r.method) for r in found] == [("unbiased", "exact"), ("biased", "exact")]
    report = report_of(p, lambda x: 1 + x, 2, Made(torch.ones_like), logit)
    assert (report.verdict, report.method) == ("biased", "exact")


def refuses_ties(x):
    if len(x.unique()) < len(x):
        raise RuntimeError("two draws are equal")
    return x


def other_number(x):
    return x if len(x.unique()) == len(x) else x[:1]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (refuses_ties, "its coupling Made raises RuntimeError on the points of the support: two draws are equal"),
        (other_number, "makes of points of the support another number of draws than 2"),
    ],
)
def test_a_coupling_that_cannot_bear_points_is_sampled_and_the_reason_said(make, said):
    m = torch.tensor(0.3, requires_grad=True)
    torch.manual_seed(0)
    report = report_of(td.Normal(m, 1.0), torch.square, 2, Made(make), m)
    assert report.method != "exact"
    assert said in report.remark
    assert report.verdict != "biased"


def test_a_coupling_with_draws_of_its_own_is_sampled():
    class Uniforms:
        unbiased = True

        def sample(self, p, num_samples):
            return (torch.rand(num_samples) < p.probs).to(p.probs.dtype).detach(), None

    logit = torch.tensor(0.3, requires_grad=True)
    report = report_of(td.Bernoulli(logits=logit), lambda x: 1 + x, 2, Uniforms(), logit)
    assert report.method != "exact"
    assert "another way than p.sample" in report.remark
    assert math.isfinite(report.largest_bias)
