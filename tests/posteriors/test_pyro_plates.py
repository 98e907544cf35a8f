"""Plates: loops, nested, entered again, beside particles; costs downstream of them."""

from itertools import product

import pyro
import pyro.distributions as dist
import pytest
import torch

import scorefn as sf
from scorefn.posteriors import ScoreFunctionELBO
from tests.posteriors.enumeration import Problem
from tests.posteriors.problems import coin, number, observe, parameters
from tests.posteriors.pyro_cases import DATA, exact_enough


@pytest.mark.parametrize("num_particles", [1, 2])
def test_plates_that_are_loops(num_particles):
    """Sequential plates: every round is a site of its own, charged as program order says."""
    logits, weight = parameters(2, ())

    def model():
        for i in pyro.plate("loop", 2):
            observe(f"x{i}", weight * coin(f"z{i}", number(0.2)), 0.7)

    def guide():
        for i in pyro.plate("loop", 2):
            coin(f"z{i}", logits[i])

    exact_enough(Problem("loop", [logits, weight], model, guide), num_particles)


def test_loops_in_loops_in_other_orders_and_absent_from_the_guide():
    logits, weight = parameters(4, ())

    def model():
        inner = pyro.plate("inner", 2)
        for i in pyro.plate("outer", 2):
            for j in inner:
                observe(f"x{i}{j}", weight * coin(f"z{i}{j}", number(0.2)), 0.7)

    def guide():
        outer = pyro.plate("outer", 2)
        for j in pyro.plate("inner", 2):
            for i in outer:
                coin(f"z{i}{j}", logits[2 * i + j])

    def flat():
        for i, j in product((1, 0), (0, 1)):
            coin(f"z{i}{j}", logits[2 * i + j])

    exact_enough(Problem("swapped loops", [logits, weight], model, guide))
    exact_enough(Problem("no loops in the guide", [logits, weight], model, flat))


def test_a_plate_in_a_loop_and_a_loop_in_a_plate():
    logits, weight = parameters((2, 2), ())

    def in_loop(read):
        def run():
            data = pyro.plate("data", 2)
            for i in pyro.plate("loop", 2):
                with data:
                    read(i)

        return run

    def in_plate(read):
        def run():
            with pyro.plate("data", 2):
                for i in pyro.plate("loop", 2):
                    read(i)

        return run

    def read_model(i):
        z = coin(f"z{i}", number([0.2, -0.1]))
        pyro.sample(f"x{i}", dist.Normal(weight * z, 1.0), obs=DATA)

    def read_guide(i):
        coin(f"z{i}", logits[i])

    for shape in (in_loop, in_plate):
        exact_enough(Problem("mixed", [logits, weight], shape(read_model), shape(read_guide), nesting=1))


def test_a_plate_that_is_entered_again_and_plates_without_size():
    slopes, weight = parameters(2, ())

    def model():
        data = pyro.plate("data", 2)
        with data:
            z = coin("z", number(0.3))
        with data:
            y = coin("y", z - weight)
        with data:
            pyro.sample("x", dist.Normal(z + weight * y, 1.0), obs=DATA)

    def guide():
        data = pyro.plate("data", 2)
        with data:
            z = coin("z", slopes)
        with data:
            coin("y", slopes * z)

    exact_enough(Problem("entered again", [slopes, weight], model, guide, nesting=1))


def test_three_plates_at_different_depths():
    outer, weight = parameters(1, (), seed=3)

    def model():
        a = pyro.plate("a", 2, dim=-1)
        with a:
            u = coin("u", number(0.1))
        with pyro.plate("b", 1, dim=-3):
            v = coin("v", weight)
        with a, pyro.plate("c", 2, dim=-2):
            pyro.sample("x", dist.Normal(u + 0.5 * v.sum(), 1.0), obs=number([[0.1, 0.2], [0.3, 0.4]]))

    def guide():
        with pyro.plate("a", 2, dim=-1):
            coin("u", outer.expand(2))
        with pyro.plate("b", 1, dim=-3):
            coin("v", outer)

    exact_enough(Problem("three depths", [outer, weight], model, guide, nesting=3))


def test_a_wrong_size_inside_a_plate():
    def run():
        with pyro.plate("data", 3):
            coin("z", torch.zeros(2))

    with pytest.raises((ValueError, RuntimeError)):
        ScoreFunctionELBO(1, max_plate_nesting=1).loss(run, run)


@pytest.mark.parametrize("num_particles", [1, 3])
@pytest.mark.parametrize("vectorize", [True, False])
def test_particles_together_with_plates_and_events(num_particles, vectorize):
    logits = pyro.param("logits", torch.zeros(4, 3, 2))

    def model():
        with pyro.plate("outer", 3, dim=-1), pyro.plate("inner", 4, dim=-2):
            pyro.sample("z", dist.Bernoulli(0.3 * torch.ones(2)).to_event(1))

    def guide():
        with pyro.plate("outer", 3, dim=-1), pyro.plate("inner", 4, dim=-2):
            pyro.sample("z", dist.Bernoulli(logits=logits).to_event(1))

    loss = ScoreFunctionELBO(num_particles, vectorize_particles=vectorize)
    assert loss.draws(model, guide).log_prob.shape == (num_particles, 12)
    loss.loss_and_grads(model, guide)
    assert logits.unconstrained().grad.abs().sum() > 0


# ----------------------------------------------------------------------------------------------------- downstream costs


def big(nested=True, flip=False, last=True):
    """Coins before, inside and between plates, in the guide in another order than in the model; two ways back up."""
    p, q, weight = parameters(3, 3, (), seed=6)

    def model():
        a = coin("a", number(0.2))
        with pyro.plate("outer", 2, dim=-1):
            b = coin("b", a - weight)
            if nested:
                with pyro.plate("inner", 1, dim=-2):
                    c = coin("c", b + a)
                    pyro.sample("x", dist.Normal(weight * c + b, 1.0), obs=DATA)
        if last:
            d = coin("d", a + 0.1 * b.sum(-1, keepdim=b.ndim > 1))
            observe("y", weight * d, 0.4)

    def guide():
        a = coin("a", p[0])

        def outer():
            with pyro.plate("outer", 2, dim=-1):
                b = coin("b", q[0] + a)
                if nested:
                    with pyro.plate("inner", 1, dim=-2):
                        coin("c", q[1] - b)

        if last and flip:
            coin("d", p[1] + a)
        outer()
        if last and not flip:
            coin("d", p[1] + a)

    return Problem("big", [p, q, weight], model, guide, nesting=2)


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("last", [True, False])
def test_costs_downstream_of_nested_sites(nested, flip, last):
    exact_enough(big(nested, flip, last))
    exact_enough(big(nested, flip, last), 1, credit=sf.Total())


def test_diamonds_are_not_counted_twice():
    """a reaches d by b and by c."""
    (p,) = parameters(4, seed=7)

    def program(first, second):
        def run():
            a = coin("a", p[0] if second is None else number(0.1))
            b, c = coin("b", first * a), coin("c", p[1] * a - 0.2)
            coin("d", p[2] * (b + c) + p[3] * b * c)

        return run

    exact_enough(Problem("diamond", [p], program(0.7, 1), program(-0.4, None)), 1)
    exact_enough(Problem("diamond", [p], program(0.7, 1), program(-0.4, None)), 2)
