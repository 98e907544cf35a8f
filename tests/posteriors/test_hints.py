"""Pyro's infer={"baseline": ...}: exact by enumeration, equal to Pyro where Pyro is right, never of its own site."""

import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, TraceGraph_ELBO
from torch import nn

import scorefn as sf
from scorefn.posteriors import ScoreFunctionELBO
from scorefn.posteriors.hints import AVERAGE
from tests.posteriors.enumeration import Problem, distance, exact_gradient, expected_gradient
from tests.posteriors.problems import coin, number, observe, parameters

EXACT = 1e-10
X = number([0.3, -1.0, 1.4])


class Net(nn.Module):
    """One number for each row of features."""

    def __init__(self, features=1):
        super().__init__()
        self.linear = nn.Linear(features, 1).double()

    def forward(self, features):
        return self.linear(features.unsqueeze(-1)).squeeze(-1)


HINTS = {
    "average": lambda net: {"use_decaying_avg_baseline": True},
    "its decay": lambda net: {"use_decaying_avg_baseline": True, "baseline_beta": 0.6},
    "net": lambda net: {"nn_baseline": net, "nn_baseline_input": X},
    "net and average": lambda net: {"nn_baseline": net, "nn_baseline_input": X, "use_decaying_avg_baseline": True},
    "value": lambda net: {"baseline_value": net(X)},
}


def in_plate(name):
    """A global coin without a hint, then a plate of three coins with one."""
    torch.manual_seed(3)
    net, (top, slopes, weight) = Net(), parameters((), 3, ())

    def model():
        g = coin("g", number(0.3))
        with pyro.plate("data", 3):
            z = coin("z", weight * g - 0.2)
            pyro.sample("x", dist.Normal(z + weight * g, 1.0), obs=X)

    def guide():
        g = coin("g", top)
        with pyro.plate("data", 3):
            coin("z", slopes + g, infer={"baseline": HINTS[name](net)})

    return Problem(name, [top, slopes, weight], model, guide, nesting=1), net


@pytest.mark.parametrize("num_particles", [1, 2])
@pytest.mark.parametrize("baseline", ["auto", sf.Constant(-2.0)])
@pytest.mark.parametrize("name", HINTS)
def test_the_expected_gradient_is_exact_with_an_average_that_was_learnt(name, baseline, num_particles):
    problem, _ = in_plate(name)
    loss = ScoreFunctionELBO(num_particles, max_plate_nesting=1, baseline=baseline)
    for _ in range(5):
        loss.differentiable_loss(problem.model, problem.guide)
    if name in ("average", "net and average"):
        assert pyro.param(AVERAGE + "z").abs().min() > 0.1
    before = {key: value.clone() for key, value in pyro.get_param_store().items()}
    assert distance(expected_gradient(problem, loss), exact_gradient(problem)) < EXACT
    assert all(torch.equal(value, pyro.param(key)) for key, value in before.items())


def branching():
    """A hint at a site that only some particles visit, from a site before it; particles one after the other."""
    torch.manual_seed(5)
    net, (logit, inner, weight) = Net(), parameters((), 2, (), seed=1)

    def model():
        a = coin("a", number(0.1))
        if coin("z", a - 0.4):
            y = coin("y", weight)
            observe("x", 2.0 if y else -1.0 + 0.0 * weight, 0.7)
        else:
            observe("x", weight * a, 0.7)

    def guide():
        a = coin("a", logit)
        if coin("z", inner[0], infer={"baseline": {"nn_baseline": net, "nn_baseline_input": a.double()}}):
            coin("y", inner[1] + a, infer={"baseline": {"use_decaying_avg_baseline": True, "baseline_value": net(a)}})

    return Problem("hints in branches", [logit, inner, weight], model, guide, batched=False)


@pytest.mark.parametrize("num_particles", [1, 2])
def test_branches_and_earlier_sites(num_particles):
    problem = branching()
    loss = ScoreFunctionELBO(num_particles, vectorize_particles=False)
    for _ in range(5):
        loss.differentiable_loss(problem.model, problem.guide)
    assert distance(expected_gradient(problem, loss), exact_gradient(problem)) < EXACT


# ---------------------------------------------------------------------------------------------------------------- Pyro


@pytest.mark.parametrize("name", HINTS)
def test_twenty_steps_are_those_of_pyro(name):
    """Where both are right, and one particle: losses, parameters, nets and averages."""

    def fit(loss):
        pyro.clear_param_store()
        pyro.set_rng_seed(1)
        net = Net()

        def model():
            with pyro.plate("data", 3):
                z = coin("z", number(0.4))
                pyro.sample("x", dist.Normal(z, 1.0), obs=X)

        def guide():
            pyro.module("net", net)
            slopes = pyro.param("slopes", number([0.1, 0.2, -0.3]))
            with pyro.plate("data", 3):
                coin("z", slopes, infer={"baseline": HINTS[name](net)})

        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), loss=loss)
        losses = [svi.step() for _ in range(20)]
        return number(losses), {key: value.detach() for key, value in pyro.get_param_store().items()}

    ours, theirs = fit(ScoreFunctionELBO(1, max_plate_nesting=1)), fit(TraceGraph_ELBO(max_plate_nesting=1))
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-5)
    assert ours[1].keys() == theirs[1].keys()
    for key, value in theirs[1].items():
        torch.testing.assert_close(ours[1][key].double(), value.double(), rtol=1e-5, atol=1e-5)


# --------------------------------------------------------------------------------------------- what is learnt, and when


@pytest.mark.parametrize(("num_particles", "vectorize"), [(1, True), (4, True), (4, False)])
def test_the_net_is_fitted_to_the_downstream_cost(num_particles, vectorize):
    problem, net = in_plate("net")
    loss = ScoreFunctionELBO(num_particles, vectorize_particles=vectorize, max_plate_nesting=1)
    pyro.set_rng_seed(2)
    estimate = loss.differentiable_loss(problem.model, problem.guide)
    gradient = torch.autograd.grad(estimate, list(net.parameters()))
    pyro.set_rng_seed(2)
    signal = loss.draws(problem.model, problem.guide).signal()[:, 1:]
    error = (signal - net(X)).square().sum() / num_particles
    torch.testing.assert_close(gradient, torch.autograd.grad(error, list(net.parameters())))
    pyro.set_rng_seed(2)
    assert loss.loss(problem.model, problem.guide) == pytest.approx(estimate.item(), abs=1e-12)


def test_the_average_is_read_before_it_is_moved():
    problem, _ = in_plate("its decay")
    loss = ScoreFunctionELBO(3, max_plate_nesting=1)
    expected = torch.zeros(3, dtype=torch.float64)
    for seed in range(4):
        pyro.set_rng_seed(seed)
        draws = loss.draws(problem.model, problem.guide)
        pyro.set_rng_seed(seed)
        loss.differentiable_loss(problem.model, problem.guide)
        expected = 0.6 * expected + 0.4 * draws.signal()[:, 1:].mean(0)
        torch.testing.assert_close(pyro.param(AVERAGE + "z").detach(), expected)
    with torch.no_grad():
        loss.differentiable_loss(problem.model, problem.guide)
    loss.loss(problem.model, problem.guide)
    torch.testing.assert_close(pyro.param(AVERAGE + "z").detach(), expected)


def test_a_ragged_minibatch_reads_and_moves_the_mean_over_the_plate():
    def model(x):
        with pyro.plate("data", 10, subsample_size=len(x)):
            pyro.sample("x", dist.Normal(coin("z", number(0.1)), 1.0), obs=x)

    def guide(x):
        logit = pyro.param("logit", number(0.2))
        with pyro.plate("data", 10, subsample_size=len(x)):
            coin("z", logit.expand(len(x)), infer={"baseline": {"use_decaying_avg_baseline": True}})

    loss = ScoreFunctionELBO(2, max_plate_nesting=1)
    loss.loss_and_grads(model, guide, X)
    before = pyro.param(AVERAGE + "z").detach().clone()
    loss.loss_and_grads(model, guide, X[:2])
    after = pyro.param(AVERAGE + "z").detach()
    assert after.shape == (3,)
    change = after - 0.9 * before
    torch.testing.assert_close(change, change.mean().expand(3))
    assert change.abs().min() > 0


def test_an_average_that_pyro_kept_for_each_particle_is_read_by_its_mean():
    problem, _ = in_plate("average")
    pyro.get_param_store()[AVERAGE + "z"] = torch.arange(6.0).double().reshape(2, 3)
    loss = ScoreFunctionELBO(2, max_plate_nesting=1)
    assert distance(expected_gradient(problem, loss), exact_gradient(problem)) < EXACT
    loss.differentiable_loss(problem.model, problem.guide)
    assert pyro.param(AVERAGE + "z").shape == (2, 3)


def test_nothing_is_evaluated_without_gradient():
    problem, net = in_plate("net")
    calls = []
    net.register_forward_hook(lambda *_: calls.append(1))
    ScoreFunctionELBO(2, max_plate_nesting=1).loss(problem.model, problem.guide)
    assert not calls


def test_dropout_in_a_net_is_no_sign_of_a_leak_and_costs_no_random_numbers():
    problem, net = in_plate("net")
    net.linear = nn.Sequential(net.linear, nn.Dropout(0.5))
    loss = ScoreFunctionELBO(2, max_plate_nesting=1)
    states = []
    for _ in range(2):
        pyro.set_rng_seed(7)
        loss.differentiable_loss(problem.model, problem.guide)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


# ------------------------------------------------------------------------------------------------------------ refusals


def refused(options, message, error=sf.ScorefnError, num_particles=1):
    def model():
        with pyro.plate("data", 3):
            pyro.sample("x", dist.Normal(coin("z", number(0.1)), 1.0), obs=X)

    def guide():
        logits = pyro.param("logits", number([0.1, 0.2, 0.3]))
        with pyro.plate("data", 3):
            coin("z", logits, infer={"baseline": options() if callable(options) else options})

    with pytest.raises(error, match=message):
        ScoreFunctionELBO(num_particles, max_plate_nesting=1).loss_and_grads(model, guide)
    assert pyro.param("logits").unconstrained().grad is None
    assert AVERAGE + "z" not in pyro.get_param_store()


def test_options_are_refused_by_name():
    refused({"nn_basline": Net()}, 'Site "z" .* unknown option.s. nn_basline; the known ones are nn_baseline,')
    refused({"nn_baseline": Net(), "nn_baseline_input": X, "baseline_value": X}, "no telling which one")
    refused({"use_decaying_avg_baseline": True, "baseline_beta": 1.0}, "baseline_beta=1.0")
    for given in ({}, {"nn_baseline_input": None}):
        refused({"nn_baseline": Net(), **given}, 'Site "z" has nn_baseline but no nn_baseline_input .* Give what')
    for given in ("x", 3.0, ["nn_baseline"], True, False):
        message = re.escape(f'Site "z" has infer={{"baseline": {given!r}}}, but it must be a dict')
        refused(given, message + ".* .nn_baseline, .* for instance")
    refused({"baseline_value": 3.0}, "is a float")
    refused({"baseline_value": X * torch.nan}, 'baseline of site "z" is NaN', sf.NonFiniteError)


@pytest.mark.parametrize("num_particles", [1, 2])
@pytest.mark.parametrize("shape", [(3, 1), (), (1,), (2,), (3, 3)])
def test_shapes_are_refused_never_broadcast(shape, num_particles):
    refused(
        {"baseline_value": torch.zeros(shape).double()},
        r"downstream cost of shape \(3,\)",
        sf.ShapeError,
        num_particles,
    )


@pytest.mark.parametrize("shape", [(3,), (1, 3), (2, 3)])
def test_shapes_that_are_accepted(shape):
    problem, _ = in_plate("value")
    given = pyro.poutine.infer_config(
        problem.guide,
        lambda s: {"baseline": {"baseline_value": torch.ones(shape).double()} if s["name"] == "z" else {}},
    )
    ScoreFunctionELBO(2, max_plate_nesting=1).loss_and_grads(problem.model, given)


def leaking(kind):
    """Ways in which a baseline may come to know its own site."""
    (logit,) = parameters(())
    seen = {"z": number(5.0)}
    options = {"nn_baseline": lambda features: 2 * features + 0 * logit.detach(), "nn_baseline_input": number(0.0)}
    if kind == "closure":
        options["nn_baseline"] = lambda features: 2 * seen["z"] + features

    def model():
        observe("x", coin("z", number(0.4)), 1.2)

    def guide():
        if kind == "value":
            options.pop("nn_baseline", None)
            options.pop("nn_baseline_input", None)
            options.pop("baseline_value", None)
            options["use_decaying_avg_baseline"] = True
        z = coin("z", logit, infer={"baseline": options})
        seen["z"] = z
        if kind == "put in later":
            options["nn_baseline_input"] = z
        elif kind == "written in place":
            options["nn_baseline_input"].copy_(z)
        elif kind == "value":
            options["baseline_value"] = 3.0 * z

    return model, guide


@pytest.mark.parametrize("kind", ["put in later", "written in place", "value", "closure"])
def test_a_baseline_that_reads_its_own_site_is_refused(kind):
    model, guide = leaking(kind)
    with pytest.raises(sf.ScorefnError, match='baseline of site "z" .*reads the value of its own site'):
        ScoreFunctionELBO(1, max_plate_nesting=0).loss_and_grads(model, guide)


def test_what_is_no_value_yet_cannot_be_read():
    seen = {}

    def guide():
        net = {"nn_baseline": lambda _: seen["z"], "nn_baseline_input": number(0.0)}
        seen["z"] = coin("z", pyro.param("logit", number(0.1)), infer={"baseline": net})

    with pytest.raises(KeyError) as caught:
        ScoreFunctionELBO(1, max_plate_nesting=0).loss_and_grads(lambda: coin("z", number(0.1)), guide)
    assert "before its value is drawn" in caught.value.__notes__[0]


def test_a_parameter_shared_with_the_bound_is_refused():
    logits = number([0.1, 0.2, 0.3]).requires_grad_()
    problem, _ = in_plate("value")

    def guide():
        coin("g", number(0.1))
        with pyro.plate("data", 3):
            coin("z", logits, infer={"baseline": {"baseline_value": 2 * logits}})

    with pytest.raises(sf.ScorefnError, match='baseline of site "z" shares a parameter with guide or model'):
        ScoreFunctionELBO(1, max_plate_nesting=1).loss_and_grads(problem.model, guide)
    assert logits.grad is None


def test_a_hint_at_a_reparameterised_site_is_without_effect():
    def guide():
        loc = pyro.param("loc", number(0.3))
        pyro.sample("z", dist.Normal(loc, 1.0), infer={"baseline": {"use_decaying_avg_baseline": True}})

    def model():
        pyro.sample("z", dist.Normal(number(0.0), 1.0))

    ScoreFunctionELBO(2, max_plate_nesting=0).loss_and_grads(model, guide)
    assert AVERAGE + "z" not in pyro.get_param_store()
