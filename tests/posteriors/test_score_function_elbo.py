"""ScoreFunctionELBO as Pyro uses it."""

import subprocess
import sys

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal, AutoNormalMessenger

import scorefn as sf
from scorefn.posteriors import ScoreFunctionELBO
from tests.posteriors import problems


def coins_model(x):
    g = pyro.sample("g", dist.Bernoulli(pyro.param("prior", torch.tensor(0.3))))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(0.2 + 0.5 * g))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def coins_guide(x):
    pyro.sample("g", dist.Bernoulli(logits=pyro.param("top", torch.tensor(0.1))))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("local", torch.zeros(len(x)))))


X = torch.tensor([0.1, 1.2, -0.3])


def leaves():
    return [pyro.param(name).unconstrained() for name in ("prior", "top", "local")]


def test_draws_have_one_column_for_each_element():
    draws = ScoreFunctionELBO(5).draws(coins_model, coins_guide, X)
    assert draws.log_prob.shape == (5, 1 + 3)
    assert draws.fx.shape == (5, (1 + 3) + (1 + 3 + 3))
    assert {name: value.shape for name, value in draws.x.items()} == {"g": (5, 1), "z": (5, 3)}
    assert draws.mask is None
    assert len(draws[1:3]) == 2


@pytest.mark.parametrize("vectorize", [True, False])
def test_the_value_is_that_of_pyro(vectorize):
    options = {"num_particles": 6, "vectorize_particles": vectorize, "max_plate_nesting": 1}
    pyro.set_rng_seed(2)
    theirs = Trace_ELBO(**options).loss(coins_model, coins_guide, X)
    pyro.set_rng_seed(2)
    assert ScoreFunctionELBO(**options).loss(coins_model, coins_guide, X) == pytest.approx(theirs, rel=1e-6)


def test_it_trains_in_svi():
    svi = SVI(coins_model, coins_guide, pyro.optim.Adam({"lr": 0.05}), loss=ScoreFunctionELBO(8))
    losses = [svi.step(X) for _ in range(100)]
    assert sum(losses[-20:]) < sum(losses[:20])
    assert isinstance(svi.evaluate_loss(X), float)


def test_retain_graph_is_honoured():
    weight = torch.tensor(0.2, requires_grad=True)
    logit = weight.exp()  # a graph outside guide and loss, freed by the first backward unless it is retained

    def model():
        pyro.sample("z", dist.Bernoulli(0.3))

    def guide():
        pyro.sample("z", dist.Bernoulli(logits=logit))

    kept = ScoreFunctionELBO(2, max_plate_nesting=0, retain_graph=True)
    kept.loss_and_grads(model, guide)
    ScoreFunctionELBO(2, max_plate_nesting=0).loss_and_grads(model, guide)
    with pytest.raises(RuntimeError, match="second time"):
        kept.loss_and_grads(model, guide)


@pytest.mark.parametrize("automatic", [AutoNormal, AutoDelta, AutoMultivariateNormal, AutoNormalMessenger])
def test_a_reparameterised_guide_has_the_pathwise_gradient(automatic):
    """Also one with an auxiliary site, and one that runs guide and model side by side."""

    def model(x):
        m = pyro.sample("m", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(m, pyro.param("s", torch.tensor(1.0))), obs=x)

    guide = automatic(model)
    options = {"num_particles": 3, "vectorize_particles": True, "max_plate_nesting": 1}
    guide(X)
    results = []
    for loss in (Trace_ELBO(**options), ScoreFunctionELBO(**options)):
        pyro.set_rng_seed(4)
        value = loss.differentiable_loss(model, guide, X)
        results.append((value.detach(), *torch.autograd.grad(value, [*guide.parameters(), pyro.param("s")])))
    torch.testing.assert_close(*results)
    with pytest.raises(sf.ScorefnError, match="no decision and no score"):
        ScoreFunctionELBO(**options).draws(model, guide, X)


def test_a_fixed_guide_lets_the_model_learn():
    def guide(x):
        pyro.sample("g", dist.Bernoulli(0.4))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(0.4))

    ScoreFunctionELBO(4).loss_and_grads(coins_model, guide, X)
    assert pyro.param("prior").unconstrained().grad.abs() > 0


def test_a_guide_and_a_model_without_gradient_are_refused():
    def model():
        pyro.sample("z", dist.Bernoulli(0.3))

    def guide():
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("logit", torch.tensor(0.1)).detach()))

    with pytest.raises(sf.ScorefnError, match="does not require grad"):
        ScoreFunctionELBO(2).loss_and_grads(model, guide)
    assert isinstance(ScoreFunctionELBO(2).loss(model, guide), float)


def test_a_baseline_with_a_state_is_updated_by_steps_alone():
    average = sf.MovingAverage(0.9)
    loss = ScoreFunctionELBO(3, baseline=average)
    loss.loss(coins_model, coins_guide, X)
    assert average.mean is None
    loss.loss_and_grads(coins_model, coins_guide, X)
    assert average.mean.shape == (4,)


def test_leave_one_out_needs_two_particles():
    with pytest.raises(sf.ScorefnError, match="num_particles is 1"):
        ScoreFunctionELBO(1, baseline=sf.LeaveOneOut()).loss_and_grads(coins_model, coins_guide, X)


def test_branches_make_absent_decisions():
    problem = problems.branch()
    draws = ScoreFunctionELBO(40, vectorize_particles=False).draws(problem.model, problem.guide)
    assert draws.log_prob.shape == (40, 3)
    first = draws.x["z"].bool()
    torch.testing.assert_close(draws.mask[:, 0], torch.ones(40, dtype=torch.bool))
    assert set(map(tuple, draws.mask[:, 1:].tolist())) == {(True, False), (False, True)}
    assert list(draws.x) == ["z"]
    visited_y = draws.mask[:, 1] if draws.mask[0, 1] == first[0] else draws.mask[:, 2]
    torch.testing.assert_close(visited_y, first)


def test_a_subsample_is_shared_by_particles_that_run_together():
    def model(x):
        with pyro.plate("data", len(x), subsample_size=2) as index:
            z = pyro.sample("z", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    def guide(x):
        logits = pyro.param("logits", torch.zeros(len(x)))
        with pyro.plate("data", len(x), subsample_size=2) as index:
            pyro.sample("z", dist.Bernoulli(logits=logits[index]))

    loss = ScoreFunctionELBO(4)
    draws = loss.draws(model, guide, X)
    assert draws.log_prob.shape == (4, 2)
    loss.loss_and_grads(model, guide, X)
    assert (pyro.param("logits").unconstrained().grad != 0).sum() <= 2


# ------------------------------------------------------------------------------------------------------------ refusals


def one_site(fn, **infer):
    return lambda: pyro.sample("z", fn(), **infer)


def logit():
    return pyro.param("logit", torch.tensor(0.1))


REFUSED = {
    "masked": (one_site(lambda: dist.Bernoulli(logits=logit()).mask(False)), "removes its score"),
    "moving support": (one_site(lambda: dist.Uniform(logit() - 1, 2.0).has_rsample_(False)), "moves with a parameter"),
}
MODELS = {"masked": lambda: dist.Bernoulli(0.3), "moving support": lambda: dist.Normal(0.0, 1.0)}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_wrong_silently_is_refused(name):
    guide, message = REFUSED[name]
    with pytest.raises(sf.ScorefnError, match=message):
        ScoreFunctionELBO(2, max_plate_nesting=0).loss_and_grads(one_site(MODELS[name]), guide)


@pytest.mark.filterwarnings("ignore:Found vars in model but not guide")
def test_a_latent_without_a_guide_is_refused():
    def model():
        pyro.sample("z", dist.Bernoulli(0.3))
        pyro.sample("y", dist.Bernoulli(0.3))

    with pytest.raises(sf.ScorefnError, match='samples "y" but the guide does not'):
        ScoreFunctionELBO(2).loss(model, one_site(lambda: dist.Bernoulli(logits=logit())))


def test_a_factor_of_the_guide_without_reparameterisation_is_refused():
    def guide():
        z = pyro.sample("z", dist.Bernoulli(logits=logit()))
        pyro.factor("extra", 0.1 * z, has_rsample=False)

    marked = poutine.infer_config(guide, lambda site: {"is_auxiliary": site["name"] == "extra"})
    with pytest.raises(sf.ScorefnError, match="observed but not reparameterised"):
        ScoreFunctionELBO(1).loss(lambda: pyro.sample("z", dist.Bernoulli(0.3)), marked)


def test_a_value_outside_the_models_support_is_named():
    def model():
        z = pyro.sample("z", dist.Bernoulli(0.3))
        pyro.factor("impossible", torch.where(z == 1, -torch.inf, 0.0))

    with pytest.raises(sf.NonFiniteError, match='Site "impossible": log p is -inf at .* of 20 particles'):
        ScoreFunctionELBO(20).loss_and_grads(model, one_site(lambda: dist.Bernoulli(logits=logit())))
    assert logit().grad is None


def test_so_is_one_of_a_reparameterised_guide():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("impossible", torch.where(z > 0, -torch.inf, 0.0 * z))

    with pytest.raises(sf.NonFiniteError, match='Site "impossible": log p is -inf at .* of 20 particles, namely'):
        ScoreFunctionELBO(20).loss_and_grads(model, one_site(lambda: dist.Normal(logit(), 1.0)))


@pytest.mark.parametrize("options", [{"num_particles": 0}, {"num_particles": 2.0}, {"baseline": "mean"}])
def test_wrong_arguments_are_refused(options):
    with pytest.raises(sf.ScorefnError):
        ScoreFunctionELBO(**options)


# ------------------------------------------------------------------------------------------------------------- borders


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_pyro_loads_with_the_first_class_that_needs_it():
    done = run(
        "import sys, scorefn as sf; sf.posteriors.elbo; assert 'pyro' not in sys.modules; "
        "sf.posteriors.ScoreFunctionELBO; assert 'pyro' in sys.modules"
    )
    assert done.returncode == 0, done.stderr


def test_without_pyro_the_repair_is_named():
    done = run("import sys; sys.modules['pyro'] = None; import scorefn as sf; sf.posteriors.ScoreFunctionELBO")
    assert "pip install 'scorefn[vi]'" in done.stderr
    assert "ModuleNotFoundError" in done.stderr
