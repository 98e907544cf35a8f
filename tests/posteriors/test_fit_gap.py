"""The gap of a fit: exact where every draw is met in proportion, over repeated diagnoses, and 0 at the posterior."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from scorefn.posteriors import ScoreFunctionELBO, bound, diagnose, evidence, psis
from scorefn.posteriors.weights import gap

PRIOR = torch.tensor([0.2, 0.5, 0.3])
OBSERVED = torch.tensor(0.7)
GUIDE = torch.tensor([0.5, 0.3, 0.2])
JOINT = PRIOR.log() + dist.Normal(torch.arange(3.0), 1.0).log_prob(OBSERVED)


def model():
    z = pyro.sample("z", dist.Categorical(PRIOR))
    pyro.sample("x", dist.Normal(z, 1.0), obs=OBSERVED)


def at(logits):
    """A guide, and its exact gap."""

    def guide():
        pyro.sample("z", dist.Categorical(logits=pyro.param("logits", logits.clone())))

    pyro.clear_param_store()
    q = logits.double().softmax(-1)
    return guide, float(JOINT.double().logsumexp(0) - (q * (JOINT.double() - q.log())).sum())


def test_the_difference_of_both_with_the_error_of_their_difference():
    """Of a table of three values, each met in proportion: by enumeration, influence by influence."""
    q, joint = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), JOINT.double()
    ratio = joint - q.log()
    weights = ratio.exp()
    exact = weights @ q
    table = torch.arange(3).repeat_interleave(torch.tensor([500, 300, 200]))
    found = gap(ratio[table], ratio[table])
    assert found.value.item() == pytest.approx(float(exact.log() - q @ ratio), rel=1e-12)
    influence = weights / exact - ratio
    variance = q @ (influence - q @ influence).square()
    assert found.standard_error.item() == pytest.approx(float((variance / 999).sqrt()), rel=1e-12)
    apart = bound(ratio[table]).standard_error.square() + evidence(ratio[table]).standard_error.square()
    assert abs(found.standard_error.square() / apart - 1) > 0.1  # which takes no notice of their covariance


def test_it_is_that_of_the_smoothed_weights_and_of_every_problem():
    torch.manual_seed(0)
    ratio = torch.randn(200, 2, dtype=torch.float64) * torch.tensor([0.5, 2.0]) - 1000
    smoothed = psis(ratio).log_weights
    found = gap(ratio, smoothed)
    torch.testing.assert_close(found.value, evidence(smoothed).value - bound(ratio).value, rtol=0, atol=1e-11)
    influence = (smoothed - smoothed.logsumexp(0) + math.log(200)).exp() - ratio
    torch.testing.assert_close(found.standard_error, influence.std(0) / math.sqrt(200), rtol=1e-11, atol=0)


def test_a_draw_outside_the_support_makes_it_infinite():
    found = gap([-1.0, -2.0, -math.inf], [-1.0, -2.0, -math.inf])
    assert found.value.item() == math.inf


def test_it_is_zero_at_the_posterior():
    ratio = torch.full((100,), -3.7)
    assert (gap(ratio, ratio).value.item(), gap(ratio, ratio).standard_error.item()) == (0.0, 0.0)
    guide, exact = at(JOINT)
    report = diagnose(ScoreFunctionELBO(4, max_plate_nesting=0), model, guide, num_draws=100, repeats=2)
    assert abs(exact) < 1e-12
    assert abs(report.gap.value.item()) < 1e-6  # log p - log q is rounded to float32
    assert report.gap.standard_error.item() < 1e-7
    assert "gap  " in str(report)
    assert "evidence less ELBO" in str(report)


def test_over_repeated_diagnoses():
    """60 reports: mean within 4.5 of its errors and half its bias; spread as told within a factor 1.5 (chi: 1e-5)."""
    guide, exact = at(GUIDE.log())
    loss = ScoreFunctionELBO(4, max_plate_nesting=0)
    pyro.set_rng_seed(0)
    found = [diagnose(loss, model, guide, num_draws=400, repeats=2).gap for _ in range(60)]
    values = torch.stack([one.value for one in found])
    told = torch.stack([one.standard_error for one in found]).mean()
    bias = told**2  # of log mean w, generously
    assert abs(values.mean() - exact) < 4.5 * told / math.sqrt(60) + bias
    assert told / 1.5 < values.std() < told * 1.5


def test_a_subsampled_model_has_none():
    def some():
        with pyro.plate("data", 4, subsample_size=2):
            z = pyro.sample("z", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.zeros(2))

    def guide():
        with pyro.plate("data", 4, subsample_size=2):
            pyro.sample("z", dist.Bernoulli(logits=pyro.param("one", torch.tensor(0.0))))

    pyro.clear_param_store()
    report = diagnose(ScoreFunctionELBO(4, max_plate_nesting=1), some, guide, num_draws=50, repeats=2)
    assert report.gap is None
    assert "gap" not in str(report)


def test_k_hat_below_zero_is_explained_and_a_gradient_without_signal():
    guide, _ = at(JOINT)
    text = str(diagnose(ScoreFunctionELBO(4, max_plate_nesting=0), model, guide, num_draws=100, repeats=2))
    assert ("-inf" in text) == ("many draws share the largest weight" in text)
    wide, _ = at(torch.zeros(3))
    report = diagnose(ScoreFunctionELBO(4, max_plate_nesting=0), model, wide, num_draws=2000, repeats=2)
    assert report.psis.k < 0
    assert "share the largest weight)" in str(report) or "negative: the weights are bounded)" in str(report)
    assert "K* is infinite without noise between minibatches" in text
