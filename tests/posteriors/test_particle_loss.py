"""What every loss for Pyro has: three ways to ask for it, and what it says of a program it cannot run."""

import pyro
import pyro.distributions as dist
import pytest
import torch

import scorefn as sf
from scorefn.posteriors import VIMCO, ScoreFunctionELBO
from tests.posteriors import problems
from tests.posteriors.vimco_cases import X, coins_guide, coins_model, leaves

LOSSES = [ScoreFunctionELBO, VIMCO]


@pytest.mark.parametrize("make", LOSSES)
@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("num_particles", [1, 4])
def test_the_three_losses_agree(make, num_particles, vectorize):
    loss = make(num_particles, vectorize_particles=vectorize, max_plate_nesting=1)
    pyro.set_rng_seed(1)
    value = loss.differentiable_loss(coins_model, coins_guide, X)
    expected = torch.autograd.grad(value, leaves())
    pyro.set_rng_seed(1)
    assert loss.loss(coins_model, coins_guide, X) == value.item()
    assert all(leaf.grad is None for leaf in leaves())
    pyro.set_rng_seed(1)
    loss = make(num_particles, vectorize_particles=vectorize, max_plate_nesting=1)  # one that has learnt nothing
    assert loss.loss_and_grads(coins_model, coins_guide, X) == value.item()
    torch.testing.assert_close(tuple(leaf.grad for leaf in leaves()), expected)


@pytest.mark.parametrize("make", LOSSES)
def test_it_serves_as_a_module(make):
    class Guide(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.logit = torch.nn.Parameter(torch.tensor(0.3))

        def forward(self):
            pyro.sample("z", dist.Bernoulli(logits=pyro.module("guide", self).logit))

    class Model(torch.nn.Module):
        def forward(self):
            z = pyro.sample("z", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.7))

    guide = Guide()
    make(4)(Model(), guide)().backward()
    assert guide.logit.grad is not None


@pytest.mark.parametrize("make", LOSSES)
def test_control_flow_in_batches_says_what_to_do(make):
    problem = problems.leak()
    with pytest.raises(RuntimeError) as caught:
        make(3, max_plate_nesting=0).loss(problem.model, problem.guide)
    note = caught.value.__notes__[0]
    assert f"{make.__name__} ran 3 particles together" in note
    assert "vectorize_particles=False" in note


@pytest.mark.parametrize("make", [lambda: ScoreFunctionELBO(2), lambda: VIMCO(2)], ids=["ELBO", "VIMCO"])
def test_a_second_derivative_of_a_score_is_refused(make):
    problem = problems.single()
    loss = make().differentiable_loss(problem.model, problem.guide)
    with pytest.raises(sf.ScorefnError, match=r"first derivative only.*scorefn\.dice\(loss\.draws"):
        torch.autograd.grad(loss, problem.params, create_graph=True)


def test_a_pathwise_loss_has_every_derivative():
    location = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def model():
        pyro.sample("x", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))

    def guide():
        pyro.sample("x", dist.Normal(location, 1.0))

    loss = ScoreFunctionELBO(3).differentiable_loss(model, guide)
    (slope,) = torch.autograd.grad(loss, location, create_graph=True)
    (curvature,) = torch.autograd.grad(slope, location)
    assert curvature.item() == pytest.approx(1.0)
