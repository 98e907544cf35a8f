"""What a site with an estimator refuses."""

import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import scorefn as sf
from scorefn.core import ScorefnError
from scorefn.estimators.estimator import Estimator
from scorefn.posteriors import VIMCO, ScoreFunctionELBO
from tests.posteriors.joint_site_problems import Mirror, plate_then_global
from tests.posteriors.problems import coin, number


def refused(words, estimator, make=None, num_particles=2, given=None, **options):
    """The loss refuses the site z, saying all these words, before anything was updated."""

    def model():
        with pyro.plate("data", 2):
            z = coin("z", number(0.4))
            pyro.sample("x", dist.Normal(z, 1.0), obs=number([0.3, -1.0]))

    def guide():
        with pyro.plate("data", 2):
            coin("z", pyro.param("logits", torch.zeros(2)), infer={} if estimator is None else {"estimator": estimator})

    model, guide = make or (model, guide)
    loss = ScoreFunctionELBO(num_particles, max_plate_nesting=1, estimators=given, **options)
    with pytest.raises(ScorefnError) as refusal:
        loss.loss_and_grads(model, guide)
    said = str(refusal.value) + " ".join(getattr(refusal.value, "__notes__", ()))
    for word in words:
        assert re.search(word, said), said


def test_the_number_of_draws():
    refused(['Mirror makes 2 draws of site "z", but num_particles is 5', "num_particles=2"], Mirror(), num_particles=5)
    refused(['Enumerate makes 2 draws of site "z", but num_particles is 3'], sf.Enumerate(), num_particles=3)


def test_what_is_no_estimator():
    refused([r'infer\["estimator"\] of site "z"=Mirror is a class', r"Mirror\(\)"], Mirror)
    refused([r"""infer\["estimator"\] of site "z"='DisARM'""", r"scorefn.DisARM\(num_pairs=4\)"], "DisARM")
    with pytest.raises(ScorefnError, match="must be a mapping from names of guide sites"):
        ScoreFunctionELBO(2, estimators=Mirror())
    with pytest.raises(ScorefnError, match=r'estimators\["z"\]=3 is no'):
        ScoreFunctionELBO(2, estimators={"z": 3})


def test_names():
    refused(['for "w"', 'samples "z"'], None, given={"w": Mirror()})
    refused(['Site "z"', "telling which"], Mirror(), given={"z": Mirror()})


def test_particles_one_after_the_other():
    refused(['Site "z"', "Mirror", "vectorize_particles=False"], Mirror(), vectorize_particles=False)


def dependent(before, estimator):
    """The site z depends on the site a, which is made so."""

    def model():
        a = before("a")
        with pyro.plate("data", 2):
            z = coin("z", number(0.4))
            pyro.sample("x", dist.Normal(z + a, 1.0), obs=number([0.3, -1.0]))

    def guide():
        a = before("a")
        with pyro.plate("data", 2):
            coin("z", pyro.param("logits", torch.zeros(2)) + a, infer={"estimator": estimator})

    return model, guide


@pytest.mark.parametrize(
    "before",
    [
        lambda name: coin(name, number(0.1)),
        lambda name: coin(name, number(0.1), infer={"estimator": Mirror()}),
        lambda name: pyro.sample(name, dist.Normal(number(0.0), 1.0)),
    ],
    ids=["a coin", "another coupled site", "a path"],
)
def test_sites_that_differ_from_particle_to_particle(before):
    words = [
        'Site "z"',
        "Mirror",
        r"batch shape \(2, 2\)",
        r'a site before it \("a"\)',
        "leave it to the score function",
    ]
    refused(words, Mirror(), dependent(before, Mirror()))


def test_the_same_values_by_luck_are_refused_too():
    """All particles drew the same a this time; they need not the next time."""
    refused(["one for each particle"], Mirror(), dependent(lambda name: coin(name, number(40.0)), Mirror()))


def test_families():
    def model():
        pyro.sample("z", dist.Poisson(2.0))

    def guide():
        pyro.sample("z", dist.Poisson(pyro.param("rate", torch.tensor(2.0))), infer={"estimator": sf.DisARM()})

    refused(["DisARM does not serve", "Poisson", 'Guide site "z"'], None, (model, guide))


def test_reparameterised_sites():
    class Anything(Estimator):
        evaluations = 2

        def sample(self, p):
            return p.sample((2,))

        def surrogate(self, p, x, fx):
            return fx.mean(0)

    def model():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    def guide():
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(2.0)), 1.0), infer={"estimator": Anything()})

    refused(['Guide site "z"', "Normal is reparameterised", "pathwise"], None, (model, guide))


@pytest.mark.parametrize(
    ("estimator", "num_particles"), [(sf.DoubleControlVariate(2), 2), (sf.REBAR(), 3), (sf.REBAR(), 1)], ids=repr
)
def test_estimators_that_need_more_than_the_cost_at_the_particles(estimator, num_particles):
    refused(['site "z"', type(estimator).__name__, "its gradient"], estimator, num_particles=num_particles)


def test_given_values_and_hints():
    refused(['Site "z"', "its value is given"], None, observed())

    def model():
        coin("z", number(0.4))

    def guide():
        hint = {"use_decaying_avg_baseline": True}
        coin("z", pyro.param("logit", torch.zeros(())), infer={"estimator": Mirror(), "baseline": hint})

    refused(['Site "z"', "subtracts no other baseline"], None, (model, guide))


def observed():
    def model():
        coin("z", number(0.4))

    def guide():
        coin("z", pyro.param("logit", torch.zeros(())), infer={"estimator": Mirror()})

    return model, poutine.condition(guide, data={"z": number(1.0)})


def test_wrong_shapes_of_a_users_own_estimator():
    class Flat(Mirror):
        def sample(self, p):
            return super().sample(p).sum(-1)

    class Summed(Mirror):
        def surrogate(self, p, x, fx):
            return super().surrogate(p, x, fx).sum()

    class Heavy(Mirror):
        def weights(self, p, x):
            return torch.ones(3)

    class Negative(Mirror):
        def weights(self, p, x):
            return number([1.5, -0.5])

    refused([r'a tensor of shape \(2,\) for site "z"', r"\(2, 2\)"], Flat())
    refused([r'of shape \(\) for site "z"', r"are \(2,\)"], Summed())
    refused([r'weights of shape \(3,\) to site "z"', r"\(2, 2\)"], Heavy())
    refused(['site "z" a weight of -0.5', "at least 0"], Negative())


def test_draws_and_other_bounds():
    problem = plate_then_global(Mirror())
    with pytest.raises(ScorefnError, match='Site "z" has an estimator.*one score for each draw'):
        ScoreFunctionELBO(2, max_plate_nesting=1).draws(problem.model, problem.guide)
    with pytest.raises(ScorefnError, match='Guide site "z" is marked .*log of their mean weight'):
        VIMCO(2, max_plate_nesting=1).loss(problem.model, problem.guide)


def test_nothing_to_train():
    def model():
        coin("z", number(0.4))

    def guide():
        coin("z", number(0.1), infer={"estimator": Mirror()})

    refused(["No guide site is trainable", '"z"'], None, (model, guide))


def test_not_finite_names_the_site():
    def model():
        z = coin("z", number(0.4))
        pyro.factor("y", torch.where(z > 0, 0.0, -torch.inf))

    def guide():
        coin("z", pyro.param("logit", torch.zeros(())), infer={"estimator": sf.Enumerate()})

    refused(['Site "y"', "log p"], None, (model, guide))
