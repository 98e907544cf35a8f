"""What a fit is told about itself, against enumeration."""

import functools
import math
from collections import Counter

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

import scorefn as sf
from applications.vi import capture_recapture
from scorefn.posteriors import (
    ScoreFunctionELBO,
    allocate,
    diagnose,
    evidence,
    fit,
    psis,
    signal_to_noise,
    site_gradients,
)
from scorefn.posteriors.fit import _Fit, _Minibatch
from tests.posteriors import enumeration, problems


def flat(parts):
    return torch.cat([part.reshape(-1) for part in parts])


def columns(draws):
    """Of the problem ``plate``: one global coin, then one for each of three data."""
    assert draws.log_prob.shape[1] == 4
    return {"g": slice(0, 1), "z": torch.tensor([1, 2, 3])}


@pytest.mark.parametrize("baseline", ["auto", None, sf.Constant(-1.3)], ids=["auto", "none", "constant"])
def test_the_sites_make_up_the_exact_gradient(baseline, float64):
    """Over all that two particles may draw; each site's expectation is the gradient of the guide's own parameters."""
    problem = problems.plate()
    guide = problem.params[:2]
    loss = ScoreFunctionELBO(2 if baseline == "auto" else 1, max_plate_nesting=1)
    found = {"g": 0.0, "z": 0.0}
    whole = torch.zeros(4)
    for probability, draws in enumeration.paths(lambda: loss.draws(problem.model, problem.guide)):
        parts = site_gradients(draws, columns(draws), guide, baseline=baseline)
        for name, part in parts.items():
            found[name] = found[name] + probability.detach() * part
        used = sf.LeaveOneOut() if baseline == "auto" else baseline
        value = sf.surrogate(draws, baseline=used).mean()
        whole += probability.detach() * torch.cat([g.reshape(-1) for g in torch.autograd.grad(value, guide)])
    exact = torch.cat([g.reshape(-1) for g in enumeration.exact_gradient(problem)[:2]])
    torch.testing.assert_close(whole, exact, rtol=0, atol=1e-12)
    torch.testing.assert_close(found["g"] + found["z"], exact, rtol=0, atol=1e-12)
    torch.testing.assert_close(found["g"][1:], torch.zeros(3), rtol=0, atol=1e-12)


def test_signal_and_variance_are_unbiased(float64):
    """Every pair of estimates of two particles of the plate, site by site."""
    problem = problems.single()
    loss = ScoreFunctionELBO(2, max_plate_nesting=0)
    gradients, weights = [], []
    for probability, draws in enumeration.paths(lambda: loss.draws(problem.model, problem.guide)):
        gradients.append(site_gradients(draws, {"z": slice(0, 1)}, problem.params[:1])["z"])
        weights.append(probability.detach())
    g, p = torch.stack(gradients), torch.stack(weights)
    mean = p @ g
    exact = (float(mean.square().sum()), float((p @ (g - mean) ** 2).sum()))
    assert mean.item() == pytest.approx(enumeration.exact_gradient(problem)[0].item(), rel=1e-12)
    signal = variance = 0.0
    for i in range(len(g)):
        for j in range(len(g)):
            found = signal_to_noise(g[[i, j]])
            signal += float(p[i] * p[j]) * found.signal
            variance += float(p[i] * p[j]) * found.variance
    assert (signal, variance) == pytest.approx(exact, rel=1e-10)


def test_signal_to_noise_of_a_constant_and_of_nothing():
    assert signal_to_noise(torch.ones(5, 2)).ratio == math.inf
    assert math.isnan(signal_to_noise(torch.zeros(5, 2)).ratio)
    centred = torch.tensor([[1.0], [-1.0]])
    assert signal_to_noise(centred).signal == pytest.approx(-1.0)
    assert signal_to_noise(centred).ratio == 0.0


def model(x, y=0.0):
    g = pyro.sample("g", dist.Bernoulli(0.3))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(0.2 + 0.5 * g))
        pyro.sample("x", dist.Normal(z + y, 1.0), obs=x)


def guide(x, y=0.0):
    pyro.sample("g", dist.Bernoulli(logits=pyro.param("top", torch.tensor(0.1))))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("local", torch.zeros(len(x)))))


X = torch.tensor([0.1, 1.2, -0.3])


def log_evidence(x):
    total = []
    for g, prior in ((0.0, 0.7), (1.0, 0.3)):
        rate = torch.tensor(0.2 + 0.5 * g)
        like = torch.stack([dist.Normal(z, 1.0).log_prob(x) for z in (0.0, 1.0)])
        joint = like + torch.stack([(1 - rate).log(), rate.log()]).unsqueeze(1)
        total.append(math.log(prior) + joint.logsumexp(0).sum())
    return torch.stack(total).logsumexp(0).item()


def test_the_report_of_a_small_model():
    found = diagnose(ScoreFunctionELBO(8), model, guide, (X,), num_draws=20_000, repeats=20)
    exact = log_evidence(X)
    assert abs(found.evidence.value.item() - exact) < 5 * found.evidence.standard_error.item()
    assert found.evidence.standard_error.item() < 0.02
    assert found.bound.value.item() < exact
    assert list(found.sites) == ["g", "z"]
    assert found.total.repeats == 20
    assert found.allocation.between == 0
    assert (found.num_particles, found.num_draws, found.scaled) == (8, 20_000, ())
    assert bool(found.psis.reliable)
    text = str(found)
    for part in ("ELBO", "log evidence", "k-hat", "importance sampling corrects", "gradient SNR", "  z", "recommended"):
        assert part in text
    assert "half of the cost" in text


@pytest.mark.parametrize("make", [problems.plate, problems.local_first], ids=["plate", "local first"])
@pytest.mark.parametrize("baseline", [None, sf.LeaveOneOut()], ids=["none", "leave one out"])
def test_what_is_measured_is_the_gradient_of_the_loss(make, baseline, float64):
    """On every path: value and gradient are the loss's own, and the sites and the pathwise part make it up."""
    problem = make()
    loss = ScoreFunctionELBO(1 if baseline is None else 2, baseline=baseline, max_plate_nesting=problem.nesting)

    pyro.get_param_store().setdefault("unused", torch.zeros(()))

    def registered():
        pyro.param("unused")
        problem.guide()

    measure, batch = _Fit(loss, problem.model, registered, ()), _Minibatch(())
    expected = enumeration.paths(lambda: loss.differentiable_loss(problem.model, problem.guide))
    measured = enumeration.paths(lambda: measure._estimate(batch, loss.num_particles))
    for (_, value), (_, (found, draws, used, columns)) in zip(expected, measured, strict=True):
        gradient = flat(torch.autograd.grad(-value, problem.params, materialize_grads=True))
        torch.testing.assert_close(found, -value, rtol=1e-14, atol=0)
        parts = site_gradients(draws, columns, problem.params, baseline=used)
        pathwise = flat(torch.autograd.grad(draws.fx.sum(1).mean(), problem.params, materialize_grads=True))
        torch.testing.assert_close(sum(parts.values()) + pathwise, gradient, rtol=1e-12, atol=1e-12)


def test_capture_recapture_is_weighed_exactly_and_its_guide_found_to_miss_a_tail(float64):
    """The weights by the formula on the very same draws; 5 standard errors of the bound: a false alarm in 1.7 million.

    Of the evidence no distance to the exact one can be asked for: that is what the verdict says.
    """
    data = capture_recapture.load()
    histories = capture_recapture.Histories(data.seen.double(), data.unseen)
    net, met = capture_recapture.CaptureRecapture(histories), []
    net.to_optimum()

    def watched():
        nodes = poutine.trace(net.model).get_trace().nodes
        met.append((nodes["omega"]["value"], nodes["p"]["value"], nodes["z"]["value"].sum(-1)))

    loss = ScoreFunctionELBO(8, max_plate_nesting=1)
    found = diagnose(loss, watched, net.guide, num_draws=10_000)
    assert found.bound.value.item() == pytest.approx(-247.849293, abs=5 * found.bound.standard_error.item())
    assert found.bound.standard_error.item() < 0.01

    start = next(i for i, (rate, _, _) in enumerate(met) if rate.numel() > 8)  # after the loss has been tried once
    omega, p, more = (torch.cat([draw[i].flatten() for draw in met[start:]])[:10_000] for i in range(3))
    number, caught, trials = len(data.seen) + more, histories.seen.sum(), histories.occasions
    with torch.no_grad():
        log_joint = histories.coefficient + number * omega.log() + (data.unseen - more) * (-omega).log1p()
        log_joint = log_joint + caught * p.log() + (trials * number - caught) * (-p).log1p()
        betas = [dist.Beta(*value.exp()) for value in (net.parameters.omega, net.parameters.p)]
        logit = net.parameters.logits[0]  # the same for all
        log_guide = betas[0].log_prob(omega) + betas[1].log_prob(p)
        log_guide = log_guide + more * logit - data.unseen * nn.functional.softplus(logit)
    smoothed = psis(log_joint - log_guide)
    torch.testing.assert_close(found.psis.log_weights, smoothed.log_weights, rtol=0, atol=1e-9)
    assert found.evidence.value.item() == pytest.approx(evidence(smoothed.log_weights).value.item(), abs=1e-9)
    assert torch.equal(found.evidence.standard_error, evidence(found.psis.log_weights).standard_error)
    assert list(found.sites) == ["omega", "p", "z"]
    assert not bool(found.psis.reliable)
    assert "misses a tail" in found.verdict


def test_nothing_is_changed():
    loss = ScoreFunctionELBO(4, baseline=sf.MovingAverage(0.9))
    optim = pyro.optim.Adam({"lr": 0.01})
    svi = pyro.infer.SVI(model, guide, optim, loss=loss)
    for _ in range(3):
        svi.step(X)
    pyro.param("top").unconstrained().grad = torch.tensor(7.0)
    store = {name: value.clone() for name, value in pyro.get_param_store().items()}
    baseline = str(vars(loss.baseline))
    attributes = set(vars(loss))
    diagnose(loss, model, guide, (X,), num_draws=50, repeats=3)
    assert all(torch.equal(value, store[name]) for name, value in pyro.get_param_store().items())
    assert pyro.param("top").unconstrained().grad.item() == 7.0
    assert str(vars(loss.baseline)) == baseline
    assert (loss.num_particles, set(vars(loss))) == (4, attributes)
    auto = ScoreFunctionELBO(4)
    before = str(vars(auto.coefficients))
    diagnose(auto, model, guide, (X,), num_draws=50, repeats=3)
    assert str(vars(auto.coefficients)) == before


def test_data_that_never_change_are_one_minibatch(monkeypatch):
    given = []

    def recorded(estimate, params, batches, **options):
        given.append((len(batches), options))
        return allocate(estimate, params, batches, **options)

    monkeypatch.setattr(fit, "allocate", recorded)
    diagnose(ScoreFunctionELBO(4), model, guide, (X,), num_draws=50, repeats=5)
    diagnose(ScoreFunctionELBO(4), model, guide, (X,), batches=[(X,), (X + 1,)], num_draws=50, repeats=5)
    assert given == [(1, {"num_particles": 4, "repeats": 10}), (5, {"num_particles": 4, "repeats": 2})]


def test_minibatches_given_by_the_user():
    """Two batches far apart: their share of the variance is found, and it limits the number of particles."""
    batches = [(X, 0.0), (X, 3.0)]
    found = diagnose(ScoreFunctionELBO(64), model, guide, (X,), batches=batches, num_draws=50, repeats=40)
    assert found.allocation.between > found.allocation.within / 64
    allocation = found.allocation  # a busy machine may measure no cost of a particle, and then no number is too large
    assert (allocation.optimum < math.inf) == (allocation.particle_cost > 0)
    assert "K* " in str(found)
    assert "between minibatches" in str(found)


@pytest.mark.parametrize("vectorize", [True, False])
def test_a_plate_that_subsamples_is_noise_between_minibatches(vectorize):
    """Each of 6 minibatches is met by 4 particles once for the sites and twice for V_w, and by 16 for the cost."""
    data, seen = torch.linspace(-3.0, 3.0, 30), []

    def subsampled():
        g = pyro.sample("g", dist.Bernoulli(0.5))
        with pyro.plate("data", 30, subsample_size=5) as index:
            seen.append(tuple(index.tolist()))
            pyro.sample("x", dist.Normal(2 * g - 1, 1.0), obs=data[index])

    def of_g():
        pyro.sample("g", dist.Bernoulli(logits=pyro.param("logit", torch.tensor(0.2))))

    loss = ScoreFunctionELBO(4, vectorize_particles=vectorize, max_plate_nesting=1)
    found = diagnose(loss, subsampled, of_g, num_draws=64, repeats=6)
    counts = [count for _, count in Counter(seen).most_common()]
    calls = 4 if vectorize else 4 + 2 * 4 + 16
    first, weights = (1, 1) if vectorize else (4, 64)  # the call that finds the parameters, and that of the weights
    assert sorted(counts) == sorted([calls] * 6 + [first, weights])
    assert found.scaled == ("x",)
    assert found.psis is None
    assert found.evidence is None
    assert "subsampled or scaled (x)" in str(found)
    assert "log evidence" not in str(found)


def test_a_sites_own_baseline_is_read_and_not_moved():
    def hinted():
        q = dist.Bernoulli(logits=pyro.param("logit", torch.tensor(0.2)))
        pyro.sample("g", q, infer={"baseline": {"use_decaying_avg_baseline": True}})

    def of_coin():
        pyro.sample("x", dist.Normal(pyro.sample("g", dist.Bernoulli(0.5)), 1.0), obs=torch.tensor(0.7))

    loss = ScoreFunctionELBO(4)
    svi = pyro.infer.SVI(of_coin, hinted, pyro.optim.Adam({"lr": 0.01}), loss=loss)
    for _ in range(3):
        svi.step()
    store = {name: value.detach().clone() for name, value in pyro.get_param_store().items()}
    assert len(store) == 2
    found = diagnose(loss, of_coin, hinted, num_draws=50, repeats=3)
    assert list(found.sites) == ["g"]
    assert {name: value.item() for name, value in pyro.get_param_store().items()} == {
        name: value.item() for name, value in store.items()
    }


def test_a_guide_without_decisions():
    def reparameterised(x):
        pyro.sample("mu", dist.Normal(pyro.param("loc", torch.tensor(0.1)), 0.5))

    def of_mean(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    found = diagnose(ScoreFunctionELBO(8), of_mean, reparameterised, (X,), num_draws=5000, repeats=10)
    covariance = torch.eye(3) + 1
    exact = dist.MultivariateNormal(torch.zeros(3), covariance).log_prob(X).item()
    assert found.sites == {}
    assert abs(found.evidence.value.item() - exact) < 5 * found.evidence.standard_error.item() + 1e-3
    assert found.total.ratio > 0


def test_a_guide_that_branches_has_every_site():
    def branching():
        if pyro.sample("z", dist.Bernoulli(0.4)):
            y = pyro.sample("y", dist.Bernoulli(0.7))
        else:
            y = pyro.sample("w", dist.Bernoulli(0.2)) - 1
        pyro.sample("x", dist.Normal(y, 1.0), obs=torch.tensor(0.7))

    def branching_guide():
        logits = pyro.param("logits", torch.tensor([-3.0, 0.2, 0.3]))
        if pyro.sample("z", dist.Bernoulli(logits=logits[0])):
            pyro.sample("y", dist.Bernoulli(logits=logits[1]))
        else:
            pyro.sample("w", dist.Bernoulli(logits=logits[2]))

    loss = ScoreFunctionELBO(4, vectorize_particles=False, max_plate_nesting=0)
    found = diagnose(loss, branching, branching_guide, num_draws=400, repeats=30)
    assert set(found.sites) == {"z", "y", "w"}
    like = dist.Normal(torch.tensor([0.0, 1.0, -1.0, 0.0]), 1.0).log_prob(torch.tensor(0.7)).exp()
    exact = (like @ torch.tensor([0.4 * 0.3, 0.4 * 0.7, 0.6 * 0.8, 0.6 * 0.2])).log().item()
    assert abs(found.evidence.value.item() - exact) < 5 * found.evidence.standard_error.item()


def test_a_module_guide_and_keyword_arguments():
    class Amortised(pyro.nn.PyroModule):
        def __init__(self):
            super().__init__()
            self.net = pyro.nn.PyroModule[nn.Linear](1, 1)
            self.top = pyro.nn.PyroParam(torch.tensor(0.0))

        def forward(self, x, y=0.0):
            pyro.sample("g", dist.Bernoulli(logits=self.top))
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Bernoulli(logits=self.net(x.unsqueeze(-1)).squeeze(-1)))

    module = Amortised()
    bound_model, bound_guide = functools.partial(model, y=0.5), functools.partial(module, y=0.5)
    found = diagnose(ScoreFunctionELBO(4), bound_model, bound_guide, (X,), num_draws=2000, repeats=5)
    assert list(found.sites) == ["g", "z"]
    assert abs(found.evidence.value.item() - log_evidence(X - 0.5)) < 5 * found.evidence.standard_error.item()
    assert all(parameter.grad is None for parameter in module.parameters())


def test_verdicts():
    found = diagnose(ScoreFunctionELBO(4), model, guide, (X,), num_draws=100, repeats=2)
    changed = {"k": torch.tensor(1.2)}
    psis = sf.posteriors.PSIS(found.psis.log_weights, threshold=0.5, **changed)
    object.__setattr__(found, "psis", psis)
    assert "have no mean" in found.verdict
    assert "weight 0" not in found.verdict
    half = torch.linspace(0.0, 1.0, 100).double()
    half[::2] = -math.inf
    object.__setattr__(found, "psis", sf.posteriors.psis(half))
    assert "corrects this guide; 50 of 100 draws have weight 0" in found.verdict
    assert "inside the model's support" in str(found)


def test_refusals():
    loss = ScoreFunctionELBO(4)
    with pytest.raises(sf.ScorefnError, match="repeats must be at least 2"):
        diagnose(loss, model, guide, (X,), repeats=1)
    with pytest.raises(sf.ScorefnError, match="num_draws must be at least 25 for k-hat, but it is 10"):
        diagnose(loss, model, guide, (X,), num_draws=10)
    with pytest.raises(sf.ScorefnError, match="loss is a Trace_ELBO"):
        diagnose(pyro.infer.Trace_ELBO(), model, guide, (X,))
    with pytest.raises(sf.ScorefnError, match="Neither model nor guide has a parameter"):
        diagnose(loss, lambda: pyro.sample("z", dist.Normal(0, 1)), lambda: pyro.sample("z", dist.Normal(0, 1)))
    problem = problems.single()
    draws = loss.draws(problem.model, problem.guide)
    with pytest.raises(sf.ScorefnError, match="There are no parameters"):
        site_gradients(draws, {"z": slice(0, 1)}, [])
    with torch.no_grad():
        flat = loss.draws(problem.model, problem.guide)
    with pytest.raises(sf.ScorefnError, match="log_prob does not require grad"):
        site_gradients(flat, {"z": slice(0, 1)}, problem.params)
    batched = sf.draw(torch.distributions.Bernoulli(logits=torch.zeros(3, requires_grad=True)), lambda x: x, 5)
    with pytest.raises(sf.ShapeError, match=r"shape \(5, 3, 1\), but sites are columns of \[N, K\]"):
        site_gradients(batched, {"z": slice(0, 1)}, problem.params)
    with pytest.raises(sf.ShapeError, match=r"shape \(1, 3\), but it must be \[R, P\]"):
        signal_to_noise(torch.zeros(1, 3))
    with pytest.raises(sf.NonFiniteError, match="A gradient is NaN"):
        signal_to_noise(torch.full((3, 3), math.nan))
