"""Programs from which no right bound can be estimated are refused by name, and nothing is changed by the attempt."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import transforms

import scorefn as sf
from scorefn.posteriors import VIMCO, ScoreFunctionELBO
from tests.posteriors.problems import coin, number, observe

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Pyro's own, of the same thing


def logit():
    return pyro.param("logit", number(0.1))


LOSSES = [ScoreFunctionELBO, VIMCO]


def refused(make, model, guide, error, message, num_particles=2, **options):
    loss = make(num_particles, max_plate_nesting=1, **options)
    for method in (loss.loss_and_grads, loss.loss, loss.draws):
        with pytest.raises(error, match=message):
            method(model, guide)
    assert logit().unconstrained().grad is None
    assert make is VIMCO or not loss.coefficients.rows


@pytest.mark.parametrize("make", LOSSES)
def test_a_guide_site_that_the_model_lacks(make):
    def guide():
        coin("z", logit())
        coin("extra", logit())

    message = 'The guide samples "extra" but the model does not, .* Sample it in the model, or drop it'
    refused(make, lambda: coin("z", number(0.1)), guide, sf.ScorefnError, message)


@pytest.mark.parametrize("make", LOSSES)
def test_a_latent_that_the_guide_lacks(make):
    def model():
        coin("z", number(0.1))
        coin("extra", number(0.1))

    message = 'The model samples "extra" but the guide does not, .* Sample it in the guide, observe it'
    refused(make, model, lambda: coin("z", logit()), sf.ScorefnError, message)


@pytest.mark.parametrize("make", LOSSES)
def test_a_guide_site_that_the_model_observes(make):
    model = poutine.condition(lambda: coin("z", number(0.1)), {"z": number(1.0)})
    refused(make, model, lambda: coin("z", logit()), sf.ScorefnError, '"z" but the model observes it')


@pytest.mark.parametrize("make", LOSSES)
def test_conditioning_both_is_fine(make):
    def program(first):
        def run():
            coin("z", first())
            coin("y", first())

        return poutine.condition(run, {"z": number(1.0)})

    loss = make(2, max_plate_nesting=1)
    loss.loss_and_grads(program(lambda: number(0.1)), poutine.block(program(logit), hide=["z"]))
    assert logit().unconstrained().grad is not None


def plated(size, subsample_size=None, dim=-1):
    def run(logits):
        with pyro.plate("data", size, subsample_size=subsample_size, dim=dim):
            coin("z", logits)

    return run


@pytest.mark.parametrize("make", LOSSES)
@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.parametrize(
    ("model", "message"),
    [(plated(4), "size 3, .* size 4"), (plated(3, dim=-2), "dim -1, .* dim -2")],
    ids=["size", "dimension"],
)
def test_plates_that_contradict(make, model, message, validate):
    """Pyro sees some of it by its own checks, which many users turn off."""

    def guide():
        plated(3)(logit().expand(3))

    with pyro.validation_enabled(validate):
        loss = make(2, max_plate_nesting=2)
        with pytest.raises(sf.ShapeError, match='Site "z" lies in plate "data".*' + message):
            loss.loss_and_grads(lambda: model(number(0.1)), guide)
    assert logit().unconstrained().grad is None


NORMAL = dist.Normal(number(0.0), number(1.0)).has_rsample_(False)
SUPPORTS = {
    "beta": (lambda: NORMAL, lambda: dist.Beta(number(2.0), number(2.0)), r"Normal on \(-inf, inf\).*Beta on \[0, 1\]"),
    "gamma": (lambda: NORMAL, lambda: dist.Gamma(number(2.0), number(2.0)), r"Gamma on \[0, inf\]"),
    "counts": (
        lambda: dist.Poisson(number(2.0)),
        lambda: dist.Binomial(3, number(0.4)),
        r"Poisson on \[0, inf\].*Binomial on \[0, 3\]",
    ),
    "classes": (
        lambda: dist.Categorical(torch.ones(4)),
        lambda: dist.Categorical(torch.ones(3)),
        r"on \[0, 3\].*on \[0, 2\]",
    ),
    "wider": (
        lambda: dist.Uniform(number(0.0), number(2.0)).has_rsample_(False),
        lambda: dist.Uniform(number(0.0), number(1.0)),
        r"on \[0, 2\].*on \[0, 1\]",
    ),
    "independent": (
        lambda: NORMAL.expand([3]).to_event(1),
        lambda: dist.Beta(number(2.0), number(2.0)).expand([3]).to_event(1),
        r"Independent on \(-inf, inf\)",
    ),
}


@pytest.mark.parametrize("make", LOSSES)
@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.parametrize("name", SUPPORTS)
def test_a_guide_that_samples_outside_the_models_support(make, name, validate):
    guide, model, message = SUPPORTS[name]
    loss = make(2, max_plate_nesting=1)
    for seed in range(5):  # whether or not a value lies outside
        pyro.set_rng_seed(seed)
        with (
            pyro.validation_enabled(validate),
            pytest.raises(sf.SupportError, match='Site "z" is sampled .*' + message),
        ):
            loss.loss_and_grads(lambda: pyro.sample("z", model()), lambda: pyro.sample("z", guide()))


KINDS = {
    "mass for a density": (lambda: dist.Bernoulli(number(0.3)), lambda: dist.Beta(number(2.0), number(2.0)), True),
    "density for a mass": (lambda: NORMAL, lambda: dist.Bernoulli(number(0.3)), False),
    "relaxed": (
        lambda: dist.RelaxedBernoulliStraightThrough(torch.tensor(0.5), logits=torch.tensor(0.3)),
        lambda: dist.Bernoulli(0.3),
        False,
    ),
    "vectors": (lambda: dist.OneHotCategorical(torch.ones(3)), lambda: dist.Dirichlet(torch.ones(3)), True),
    "elements": (
        lambda: dist.Poisson(number(2.0)).expand([3]).to_event(1),
        lambda: dist.Gamma(number(2.0), number(2.0)).expand([3]).to_event(1),
        True,
    ),
}


@pytest.mark.parametrize("make", LOSSES)
@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.parametrize("name", KINDS)
def test_a_probability_is_no_density(make, name, validate):
    guide, model, mass = KINDS[name]
    own, other = ("discrete", "continuous") if mass else ("continuous", "discrete")
    loss = make(2, max_plate_nesting=1)
    message = f'Site "z" is sampled by the guide from .* which is {own}, but .* which is {other}: .*Use a {other} guide'
    with pyro.validation_enabled(validate), pytest.raises(sf.SupportError, match=message):
        loss.loss_and_grads(lambda: pyro.sample("z", model()), lambda: pyro.sample("z", guide()))


INSIDE = [
    (lambda: dist.LogNormal(number(0.0), 1.0), lambda: dist.Gamma(number(2.0), 1.0)),
    (lambda: dist.Gamma(number(2.0), number(1.0)), lambda: dist.HalfNormal(number(1.0))),
    (lambda: dist.Bernoulli(number(0.3)), lambda: dist.Poisson(number(1.0))),
    (lambda: dist.Bernoulli(number(0.3)), lambda: dist.Categorical(torch.ones(2))),
    (lambda: dist.Uniform(number(0.2), number(0.7)), lambda: dist.Beta(number(2.0), number(2.0))),
    (lambda: dist.Delta(number(0.4)), lambda: dist.Beta(number(2.0), number(2.0))),
    (
        lambda: dist.TransformedDistribution(dist.Normal(number(0.0), 1.0), [transforms.SigmoidTransform()]),
        lambda: dist.Beta(number(2.0), number(2.0)),
    ),
    (lambda: dist.Dirichlet(torch.ones(3)), lambda: dist.Dirichlet(torch.ones(3))),
    (
        lambda: dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.Poisson(torch.ones(2))),
        lambda: dist.Poisson(1.0),
    ),
]


@pytest.mark.parametrize(("guide", "model"), INSIDE)
def test_supports_inside_the_models_are_accepted(guide, model):
    ScoreFunctionELBO(1, max_plate_nesting=0).loss(lambda: pyro.sample("z", model()), lambda: pyro.sample("z", guide()))


class Renamed(ScoreFunctionELBO):
    """A user's own."""


@pytest.mark.parametrize("loss", [ScoreFunctionELBO, VIMCO, Renamed])
@pytest.mark.parametrize("where", ["guide", "model"])
@pytest.mark.parametrize("validate", [True, False])
def test_a_mark_for_enumeration_is_refused_by_the_loss_that_is_used(loss, where, validate):
    """A model's mark counts where the guide lacks the site: otherwise the guide's replaces it."""
    marked = {"infer": {"enumerate": "parallel"}}

    def model():
        coin("z", number(0.1))
        if where == "model":
            pyro.sample("y", dist.Bernoulli(0.3), **marked)

    def guide():
        pyro.sample("z", dist.Bernoulli(logits=logit()), **(marked if where == "guide" else {}))

    name = "z" if where == "guide" else "y"
    message = rf'Site "{name}" is marked .* but {loss.__name__} samples every site .* use pyro\.infer\.TraceEnum_ELBO'
    with pyro.validation_enabled(validate), pytest.raises(sf.ScorefnError, match=message):
        loss(2, max_plate_nesting=0).loss_and_grads(model, guide)
    assert logit().unconstrained().grad is None


def test_an_observed_site_may_be_marked():
    def model():
        observe("x", coin("z", number(0.1)), 0.3)

    marked = poutine.infer_config(model, lambda site: {"enumerate": "parallel"} if site["is_observed"] else {})
    ScoreFunctionELBO(2, max_plate_nesting=0).loss_and_grads(marked, lambda: coin("z", logit()))
    assert logit().unconstrained().grad is not None


@pytest.mark.parametrize("make", LOSSES)
@pytest.mark.parametrize("vectorize", [True, False])
def test_a_nan_is_named_by_its_site(make, vectorize):
    def model():
        z = coin("z", number(0.1))
        observe("fine", z, 0.3)
        observe("broken", torch.where(z == 1, torch.nan, 0.0), 0.3)

    with pyro.validation_enabled(False):
        refused(
            make,
            model,
            lambda: coin("z", logit()),
            sf.NonFiniteError,
            'Site "broken": log p is nan at .* of 20 particles.* inside the model\'s support',
            20,
            vectorize_particles=vectorize,
        )


@pytest.mark.parametrize("make", LOSSES)
def test_a_nan_of_the_guide_is_named_too(make):
    def guide():
        pyro.sample("z", dist.Normal(logit() * torch.nan, 1.0).has_rsample_(False))

    with pyro.validation_enabled(False):
        model = lambda: pyro.sample("z", dist.Normal(number(0.0), 1.0))  # noqa: E731
        refused(make, model, guide, sf.NonFiniteError, 'Site "z": (-log q|log p|the score.s log q) is nan')


def test_leave_one_out_with_one_particle():
    for baseline in (sf.LeaveOneOut(), sf.AdaptiveRaoBlackwell(), sf.OptimalConstant()):
        name = type(baseline).__name__
        with pytest.raises(sf.ScorefnError, match=f"{name} of .* num_particles is 1, .* Raise num_particles"):
            ScoreFunctionELBO(1, max_plate_nesting=0, baseline=baseline)
        ScoreFunctionELBO(2, max_plate_nesting=0, baseline=baseline)


@pytest.mark.parametrize("nesting", [-1, 0.5, -torch.inf, torch.nan, True, None, "1"])
@pytest.mark.parametrize("make", LOSSES)
def test_a_number_of_plates_that_is_none(make, nesting):
    with pytest.raises(sf.ScorefnError, match=f"max_plate_nesting must be .* but it is {nesting!r}. Count them"):
        make(2, max_plate_nesting=nesting)


def test_a_credit_that_is_none():
    with pytest.raises(sf.ScorefnError, match="credit='x' is no credit, .* or None for program order"):
        ScoreFunctionELBO(2, credit="x")
    with pytest.raises(sf.ScorefnError, match="credit=Total is a class, .* with parentheses"):
        ScoreFunctionELBO(2, credit=sf.Total)
    ScoreFunctionELBO(2, credit=sf.Total())


@pytest.mark.parametrize("dependencies", ["order", "tracked"])
@pytest.mark.parametrize("steps", [0, -1, 1.5, None])
def test_audits_that_never_come(dependencies, steps):
    with pytest.raises(sf.ScorefnError, match=f"audit_every must be an integer of at least 1, but it is {steps}"):
        ScoreFunctionELBO(2, dependencies=dependencies, audit_every=steps)


def test_a_weight_that_leaves_one_out_needs_two_particles_only_where_it_is_asked_for():
    """The bound of one particle is the ELBO; what stands in for its weight needs no other."""
    VIMCO(1, max_plate_nesting=0).loss_and_grads(lambda: coin("z", number(0.1)), lambda: coin("z", logit()))
    assert torch.isfinite(logit().unconstrained().grad)


@pytest.mark.parametrize("make", LOSSES)
def test_a_guide_without_anything_to_train(make):
    def program():
        coin("z", number(0.3))
        coin("y", number(0.1))

    loss = make(2, max_plate_nesting=0)
    for method in (loss.loss_and_grads, loss.draws):
        with pytest.raises(sf.ScorefnError, match='No guide site is trainable: "z", "y" would need .* pyro.param'):
            method(program, program)
    assert isinstance(loss.loss(program, program), float)


def test_a_fixed_score_site_beside_a_trained_one_is_fine():
    def program(first):
        def run():
            coin("fixed", number(0.3))
            coin("z", first())

        return run

    ScoreFunctionELBO(2, max_plate_nesting=0).loss_and_grads(program(lambda: number(0.2)), program(logit))
    assert logit().unconstrained().grad is not None


def knowing():
    """A baseline that reads the value of its own site, by a tensor that the guide fills in afterwards."""
    told = torch.zeros(())

    def guide():
        z = pyro.sample("z", dist.Bernoulli(logits=logit()), infer={"baseline": {"baseline_value": told}})
        told.copy_(z.detach().sum())

    return guide


def test_a_baseline_that_knows_its_own_site():
    loss = ScoreFunctionELBO(1, max_plate_nesting=0)
    with pytest.raises(
        sf.ScorefnError, match='baseline of site "z" was another one after .* Give it inputs that exist'
    ):
        loss.loss_and_grads(lambda: coin("z", number(0.1)), knowing())
    assert logit().unconstrained().grad is None


def test_a_bound_of_many_has_no_baseline_of_sites():
    with pytest.raises(sf.ScorefnError, match='"z" carries infer=.* only ScoreFunctionELBO reads: .* Remove the mark'):
        VIMCO(2, max_plate_nesting=0).loss_and_grads(lambda: coin("z", number(0.1)), knowing())
    assert logit().unconstrained().grad is None
