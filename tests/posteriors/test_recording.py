"""Recorded runs: the traces are those of Pyro, whichever way the densities were had."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.enum import get_importance_trace

from scorefn.posteriors import ScoreFunctionELBO, recording, traces
from scorefn.posteriors.hints import HintReader
from tests.posteriors import problems
from tests.posteriors.problems import coin, number, observe

FAMILIES = {
    "Bernoulli": lambda a: dist.Bernoulli(logits=a),
    "Bernoulli of probabilities": lambda a: dist.Bernoulli(probs=a.sigmoid()),
    "Categorical": lambda a: dist.Categorical(logits=torch.stack((a, 2 * a, a * a), -1)),
    "Exponential": lambda a: dist.Exponential(a.exp()),
    "Normal": lambda a: dist.Normal(a, (0.3 * a).exp()),
    "Normal, scored": lambda a: dist.Normal(a, (0.3 * a).exp()).has_rsample_(False),
}
FIELDS = ("value", "log_prob", "unscaled_log_prob")


class Shifted(dist.Bernoulli):
    """A family of the user's, whose density is another one."""

    def log_prob(self, value):
        return super().log_prob(value) + self.logits.sin()


def own_log_prob(a):
    """A distribution that was changed by hand."""
    fn = dist.Normal(a, 1.0)
    fn.log_prob = lambda value: -((value - a) ** 4)
    return fn


ALONE = {
    "subclass": lambda a: Shifted(logits=a),
    "changed by hand": own_log_prob,
    "validated": lambda a: dist.Normal(a, a.exp(), validate_args=True),
    "event": lambda a: dist.Normal(a, a.exp()).to_event(a.ndim),
    "masked": lambda a: dist.Normal(a, a.exp()).mask(a > 0),
}


@pytest.fixture(autouse=True)
def without_validation():
    with pyro.validation_enabled(False):
        yield


def program(make, numbers):
    """Sites of one family, one of them scaled and one masked."""

    def run():
        for index, a in enumerate(numbers):
            with poutine.scale(scale=(1.0, 2.5)[index == 1]), poutine.mask(mask=torch.tensor(index != 2)):
                pyro.sample(f"z{index}", make(a))

    return run


def both(model, guide):
    """Traces of Pyro and ours, of the same draws."""
    pyro.set_rng_seed(0)
    theirs = get_importance_trace("flat", 0, model, guide, (), {})
    pyro.set_rng_seed(0)
    return theirs, recording.recorded(model, guide, (), {}, 0, HintReader(set()))


def check_same(theirs, ours):
    for one, other in zip(theirs, ours, strict=True):
        assert list(one.nodes) == list(other.nodes)
        for name, site in one.nodes.items():
            if site["type"] != "sample":
                continue
            mine = other.nodes[name]
            for field in FIELDS:
                assert torch.equal(site[field], mine[field]), (name, field)
            for part, own in zip(site.get("score_parts", ()), mine.get("score_parts", ()), strict=True):
                assert torch.equal(torch.as_tensor(part), torch.as_tensor(own)), name
            assert ("score_parts" in site) == ("score_parts" in mine)


def total(pair):
    return sum(
        (index * site["log_prob"]).sum()
        for trace in pair
        for index, site in enumerate(trace.nodes.values())
        if site["type"] == "sample"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (3,), (2, 5)])
@pytest.mark.parametrize("name", FAMILIES)
def test_densities_had_together_are_those_of_pyro_to_the_bit(name, shape, dtype):
    first, second = (torch.randn(9, *shape, dtype=dtype, requires_grad=True) for _ in range(2))
    theirs, ours = both(program(FAMILIES[name], first), program(FAMILIES[name], second))
    check_same(theirs, ours)
    assert "log_prob_sum" not in ours[1].nodes["z0"]  # or they were not had together
    for one, other in zip(*(torch.autograd.grad(total(pair), (first, second)) for pair in (theirs, ours)), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=8 * torch.finfo(dtype).eps * float(one.abs().max()))


@pytest.mark.parametrize("name", ALONE)
def test_what_is_no_plain_member_of_its_family_stays_alone(name):
    numbers = torch.randn(5, 2)
    theirs, ours = both(program(ALONE[name], numbers), program(ALONE[name], numbers))
    check_same(theirs, ours)
    assert all("log_prob_sum" in site for site in ours[0].nodes.values() if site["type"] == "sample")


def test_observations_that_are_broadcast_or_of_another_dtype_stay_alone():
    def model():
        for index in range(4):
            pyro.sample(f"x{index}", dist.Normal(torch.zeros(3), 1.0), obs=torch.tensor(0.5))
            pyro.sample(f"y{index}", dist.Normal(torch.zeros(2), 1.0), obs=torch.ones(2).double())
            pyro.sample(f"w{index}", dist.Normal(torch.zeros(2, dtype=(torch.half, torch.double)[index % 2]), 1.0))

    check_same(*both(model, lambda: None))


def test_a_family_is_known_by_all_that_its_density_reads():
    """What the table leaves out would be missing here, as soon as a family begins to read it."""
    for family, names in recording.READ_BY_LOG_PROB.items():
        fn = family(*(torch.ones(2, 3) for _ in names))
        bare = object.__new__(family)
        bare.__dict__.update({"_validate_args": False} | {name: getattr(fn, name) for name in names})
        value = fn.sample()
        assert torch.equal(bare.log_prob(value), fn.log_prob(value))


def test_subsampled_plates_leave_no_site():
    def model():
        with pyro.plate("data", 6, subsample_size=2) as index:
            pyro.sample("z", dist.Normal(index.float(), 1.0))

    theirs, ours = both(model, model)
    check_same(theirs, ours)
    assert all("data" not in trace.nodes for trace in ours)


def test_an_error_of_the_program_comes_with_its_shapes():
    def model():
        pyro.sample("a", dist.Normal(torch.zeros(4), 1.0).to_event(1))
        raise ValueError("of the user's")

    with pytest.raises(ValueError, match=r"of the user's\n[\s\S]*a dist"):
        recording.recorded(model, lambda: None, (), {}, 0, HintReader(set()))


def gradient(problem, run):
    return torch.autograd.grad(run, problem.params, materialize_grads=True, allow_unused=True)


@pytest.mark.parametrize(
    "make", [problems.plate, problems.subsampled, problems.masked, problems.event, problems.branch]
)
def test_to_first_order_a_silenced_entropy_is_a_constant(make, monkeypatch):
    problem = make()
    loss = ScoreFunctionELBO(max_plate_nesting=problem.nesting, vectorize_particles=problem.batched)
    original = traces.read_run
    found = []
    for order in (1, None):
        monkeypatch.setattr(
            "scorefn.posteriors.score_function_elbo.read_run", lambda a, b, n, _, o=order: original(a, b, n, o)
        )
        pyro.set_rng_seed(3)
        value = loss.differentiable_loss(problem.model, problem.guide)
        found.append((value, *gradient(problem, value)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-13)


def test_a_scale_that_learns_keeps_its_gradient():
    """The scale of a decision's -log q is no part of what is silenced."""
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)

    def program():
        with poutine.scale(scale=scale):
            coin("z", number(0.7).requires_grad_())

    def model():
        coin("z", number(-0.4))
        observe("x", number(0.1), 0.5)

    pyro.set_rng_seed(0)
    (slope,) = torch.autograd.grad(ScoreFunctionELBO().differentiable_loss(model, program), scale)
    pyro.set_rng_seed(0)
    z = dist.Bernoulli(logits=number(0.7)).sample()
    assert float(slope) == pytest.approx(float(dist.Bernoulli(logits=number(0.7)).log_prob(z)))


def test_the_plate_of_the_particles_follows_its_loss():
    problem = problems.plate()
    loss = ScoreFunctionELBO(3, max_plate_nesting=2)
    assert len(loss.draws(problem.model, problem.guide)) == 3
    loss.num_particles = 5
    assert len(loss.draws(problem.model, problem.guide)) == 5
    loss.max_plate_nesting = 4
    assert len(loss.draws(problem.model, problem.guide)) == 5

    def broken():
        raise KeyError("once")

    with pytest.raises(KeyError):
        loss.draws(problem.model, broken)
    assert len(loss.draws(problem.model, problem.guide)) == 5
