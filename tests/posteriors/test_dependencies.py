"""Tracked dependencies: exact by enumeration, sharper than program order, and given up where they are wrong."""

import threading
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceGraph_ELBO
from pyro.infer.autoguide import AutoNormalMessenger

import scorefn as sf
from scorefn.posteriors import ScoreFunctionELBO
from scorefn.tracking import EscapeWarning
from tests.posteriors import problems
from tests.posteriors.enumeration import Problem, distance, exact_gradient, paths
from tests.posteriors.problems import coin, number, observe, parameters


def loss_of(problem, num_particles=1, dependencies="tracked", **options):
    return ScoreFunctionELBO(
        num_particles,
        max_plate_nesting=problem.nesting,
        vectorize_particles=problem.batched,
        dependencies=dependencies,
        **{"baseline": sf.LeaveOneOut() if num_particles > 1 else None, **options},
    )


def moments(problem, loss):
    """Expected gradient of ``-loss`` and the variance of all its components, exactly; one loss runs every path."""
    mean, square = [torch.zeros_like(param) for param in problem.params], 0.0
    for probability, value in paths(lambda: loss.differentiable_loss(problem.model, problem.guide)):
        parts = torch.autograd.grad(-value, problem.params, allow_unused=True, materialize_grads=True)
        for total, part in zip(mean, parts, strict=True):
            total += probability.detach() * part
        square += float(probability.detach()) * sum(float(part.square().sum()) for part in parts)
    return mean, square - sum(float(total.square().sum()) for total in mean)


def error(problem, *args, **options):
    return distance(moments(problem, loss_of(problem, *args, **options))[0], exact_gradient(problem))


# ------------------------------------------------------------------------- eight ordinary ways out of the tensor graph


def _branch(z, weight):
    return weight if z else -weight


def _item(z, weight):
    return weight * (z.item() + 0.3)


def _listed(z, weight):
    return [-weight, 2 * weight][int(z)]


def _set_value(z, weight):
    m = torch.zeros(2, dtype=torch.float64)
    m[0] = z
    return weight * m.sum()


def _set_index(z, weight):
    m = torch.zeros(2, dtype=torch.float64)
    m[z.long()] = 1
    return weight * m[1]


def _numpy(z, weight):
    return weight * torch.as_tensor(np.sqrt(z.numpy() + 0.3))


def _vmapped(z, weight):
    return weight * torch.vmap(lambda row: row * z)(torch.ones(2, dtype=torch.float64)).sum()


def _out(z, weight):
    m = torch.zeros((), dtype=torch.float64)
    torch.add(z, 0.3, out=m)
    return weight * m


LEAKS = {
    "if z": _branch,
    ".item()": _item,
    "list[int(z)]": _listed,
    "m[0] = z": _set_value,
    "m[z] = 1": _set_index,
    "numpy": _numpy,
    "torch.vmap": _vmapped,
    "out=": _out,
}
PYTHON = ("if z", ".item()", "list[int(z)]", "numpy")


def leaking(pattern):
    logit, weight = parameters((), ())

    def model():
        observe("x", pattern(coin("z", number(-0.5)), weight), 0.9)

    def guide():
        coin("z", logit)

    return Problem("a leak", [logit, weight], model, guide, batched=False)


def by_trace_graph(problem):
    """The expected gradient of TraceGraph_ELBO, which has no differentiable loss."""
    loss = TraceGraph_ELBO(max_plate_nesting=problem.nesting)
    total = [torch.zeros_like(param) for param in problem.params]

    def gradient():
        for param in problem.params:
            param.grad = None
        loss.loss_and_grads(problem.model, problem.guide)
        return [torch.zeros_like(param) if param.grad is None else -param.grad for param in problem.params]

    for probability, parts in paths(gradient):
        for index, part in enumerate(parts):
            total[index] += probability.detach() * part
    return total


@pytest.mark.filterwarnings("ignore::scorefn.tracking.EscapeWarning")
@pytest.mark.parametrize("name", LEAKS)
def test_leaks_are_exact_here_and_wrong_in_trace_graph(name):
    problem = leaking(LEAKS[name])
    for dependencies in ("order", "tracked"):
        assert error(problem, dependencies=dependencies) < 1e-10
        assert error(problem, 2, dependencies=dependencies) < 1e-10
    theirs = distance(by_trace_graph(problem), exact_gradient(problem))
    if theirs < 1e-10:
        pytest.skip(f"this Pyro {pyro.__version__} follows {name!r} too")
    assert theirs > 0.01


def test_trace_graph_is_right_where_nothing_leaks():
    """So that the comparison above is fair."""
    problem = leaking(lambda z, weight: weight * torch.where(z > 0, 1.0, -1.0))
    assert distance(by_trace_graph(problem), exact_gradient(problem)) < 1e-10
    assert error(problem) < 1e-10


@pytest.mark.parametrize("name", PYTHON)
def test_a_site_that_leaves_the_graph_is_named_once(name):
    problem = leaking(LEAKS[name])
    loss = loss_of(problem)
    with pytest.warns(EscapeWarning, match='guide site "z" left the tensor graph by .* line'):
        loss.differentiable_loss(problem.model, problem.guide)
    loss.differentiable_loss(problem.model, problem.guide)  # a second warning would be an error


# --------------------------------------------------------------------------------------------- exactness and sharpness


@pytest.mark.filterwarnings("ignore::scorefn.tracking.EscapeWarning")
@pytest.mark.parametrize("make", problems.SMALL)
@pytest.mark.parametrize("num_particles", [1, 2])
def test_tracked_is_exact(make, num_particles):
    problem = make()
    assert error(problem, num_particles) < 1e-10


def independent():
    """Three coins, each with a datum of its own; the model meets all of them first."""
    logits, weight = parameters(3, (), seed=12)

    def model():
        z = [coin(f"z{i}", number(0.3)) for i in range(3)]
        for i in range(3):
            observe(f"x{i}", weight * z[i], 0.5 + i)

    def guide():
        for i in range(3):
            coin(f"z{i}", logits[i])

    return Problem("independent coins", [logits, weight], model, guide)


def two_chains():
    """Two chains of two coins, sampled in turn."""
    logits, weight = parameters(4, (), seed=13)

    def model():
        a = coin("a", number(0.3))
        b = coin("b", number(-0.2))
        c, d = coin("c", a - weight), coin("d", b + weight)
        observe("x", weight * c, 0.4)
        observe("y", weight * d, -0.8)

    def guide():
        a = coin("a", logits[0])
        b = coin("b", logits[1])
        coin("c", logits[2] + a)
        coin("d", logits[3] - b)

    return Problem("two chains", [logits, weight], model, guide)


def bystander():
    """A global coin between two entries of a plate, which does not read the plate: indices stay apart."""
    slopes, top, weight = parameters(3, (), (), seed=14)

    def model():
        data = pyro.plate("data", 3)
        with data:
            z = coin("z", number(0.3))
        s = coin("s", weight)
        with data:
            pyro.sample("x", dist.Normal(weight * s + z, 1.0), obs=number([0.3, -1.0, 0.8]))

    def guide():
        with pyro.plate("data", 3):
            coin("z", slopes)
        coin("s", top)

    return Problem("a bystander", [slopes, top, weight], model, guide, nesting=1)


def through_noise():
    """What a coin does passes through a reparameterised site."""
    logit, loc, weight = parameters((), (), (), seed=22)

    def model():
        a, b = coin("a", number(0.2)), coin("b", number(0.1))
        y = pyro.sample("y", dist.Normal(a, 1.0))
        observe("x", weight * y, 0.4)
        observe("w", weight * b, 0.4)

    def guide():
        a = coin("a", logit)
        coin("b", 2 * logit)
        pyro.sample("y", dist.Normal(loc + a, number(0.8)))

    return Problem("through a reparameterised site", [logit, loc, weight], model, guide)


SHARPER = [independent, two_chains, bystander, through_noise]


@pytest.mark.parametrize(
    ("make", "num_particles"), [*((make, 1) for make in SHARPER), (independent, 2), (through_noise, 2)]
)
def test_tracked_is_exact_and_of_lower_variance_than_order(make, num_particles):
    problem = make()
    exact = exact_gradient(problem)
    means, variances = zip(
        *(moments(problem, loss_of(problem, num_particles, d)) for d in ("order", "tracked")), strict=True
    )
    assert distance(means[0], exact) < 1e-10
    assert distance(means[1], exact) < 1e-10
    assert variances[1] < 0.97 * variances[0]


@pytest.mark.filterwarnings("ignore::scorefn.tracking.EscapeWarning")
@pytest.mark.parametrize("make", [*SHARPER, *problems.ALL])
def test_tracked_never_charges_more_than_order(make):
    problem = make()
    masks = []
    for dependencies in ("order", "tracked"):
        pyro.set_rng_seed(0)
        draws = loss_of(problem, 1, dependencies).draws(problem.model, problem.guide)
        basis = torch.eye(draws.fx.shape[-1], dtype=torch.float64)[:, None]
        masks.append(torch.stack([draws.credit.influence(row)[0] for row in basis]))
    order, tracked = masks
    assert bool(((tracked == 0) | (tracked == 1)).all())
    assert bool((tracked <= order).all())
    assert make not in SHARPER or bool((tracked < order).any())


@pytest.mark.parametrize("make", SHARPER)
def test_the_credit_equals_its_dense_twin(make):
    problem = make()
    draws = loss_of(problem, 3).draws(problem.model, problem.guide)
    credit, J, K = draws.credit, draws.fx.shape[-1], draws.log_prob.shape[-1]
    mask = credit.influence(torch.eye(J, dtype=torch.float64)).T > 0
    dense, generator = sf.Influence(mask), torch.Generator().manual_seed(0)
    u = torch.randn(5, K, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(credit.influence_adjoint(u), dense.influence_adjoint(u))
    torch.testing.assert_close(credit.predecessors(u), dense.predecessors(u))


def test_a_map_found_on_one_path_is_sound_on_another():
    """At z = 0 Python does not look at y; at z = 1 it does, and sites and shapes are the same."""
    logits, weight = parameters(3, (), seed=16)

    def model():
        z, y = coin("z", number(0.2)), coin("y", number(-0.4))
        v = coin("v", number(0.1))
        loc = -weight
        if z:
            loc = 2 * weight if y else weight
        observe("w", loc, 0.8)
        observe("x", v * weight, 0.1)

    def guide():
        for i, name in enumerate("zyv"):
            coin(name, logits[i])

    problem = Problem("two paths", [logits, weight], model, guide, batched=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EscapeWarning)
        assert error(problem) < 1e-10
        assert error(problem, 2) < 1e-10


# --------------------------------------------------------------------------------------------------- audits and caches


def counted(problem):
    runs = []

    def model():
        runs.append(None)
        return problem.model()

    return Problem(problem.name, problem.params, model, problem.guide, problem.nesting, problem.batched), runs


def test_the_map_is_found_once_and_audited_again():
    problem, runs = counted(independent())
    loss, counts = loss_of(problem, 4, audit_every=5), []
    for _ in range(11):
        before = len(runs)
        loss.loss_and_grads(problem.model, problem.guide)
        counts.append(len(runs) - before)
    assert [count == 1 for count in counts] == [False, True, True, True, True] * 2 + [False]
    assert counts[5] < counts[0]


def test_the_first_audits_follow_sooner_than_the_later_ones():
    problem, runs = counted(independent())
    loss, audited = loss_of(problem, 4, audit_every=20), []
    for step in range(80):
        before = len(runs)
        loss.loss_and_grads(problem.model, problem.guide)
        if len(runs) > before + 1:
            audited.append(step)
    assert audited == [0, 16, 36, 56, 76]


def test_what_is_as_sharp_as_order_needs_no_audit():
    problem, runs = counted(problems.single())
    loss = loss_of(problem, 4, audit_every=1)
    for _ in range(3):
        loss.loss_and_grads(problem.model, problem.guide)
    assert len(runs) == 4


def test_without_gradient_nothing_is_tracked():
    problem, runs = counted(independent())
    loss_of(problem, 4).loss(problem.model, problem.guide)
    assert len(runs) == 1


def test_random_numbers_are_as_in_order():
    problem = independent()
    values = []
    for dependencies in ("order", "tracked"):
        pyro.set_rng_seed(3)
        loss = loss_of(problem, 2, dependencies)
        values.append([loss.loss_and_grads(problem.model, problem.guide) for _ in range(4)])
    assert values[0] == values[1]


def behind_the_graph(channel, shared=True):
    """The datum depends on `a` through something that tracking cannot see."""
    logits, weight = parameters(2, (), seed=17)

    def model():
        a = coin("a", number(0.2))
        b = coin("b", number(0.2))
        observe("x", number(0.7) * channel(a) + (b if shared else 0.0), 0.4)
        observe("y", weight * b, 0.4)

    def guide():
        coin("a", logits[0])
        coin("b", logits[1])

    return Problem("behind the graph", [logits, weight], model, guide)


def in_a_thread(z):
    result = []
    thread = threading.Thread(target=lambda: result.append(2 * z + 0.1))
    thread.start()
    thread.join()
    return result[0]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of a thread under vmap
@pytest.mark.parametrize("shared", [True, False])
def test_a_refuted_map_is_named_and_not_used(shared):
    """Also where the datum seems to depend on nothing at all."""
    problem = behind_the_graph(in_a_thread, shared)
    loss = loss_of(problem)
    with pytest.warns(UserWarning, match='changed the guide site "a", and log p of site "x" moved'):
        loss.differentiable_loss(problem.model, problem.guide)
    assert loss.dependencies.refuted
    assert distance(moments(problem, loss)[0], exact_gradient(problem)) < 1e-10  # without a second warning


def test_a_map_that_became_wrong_is_found_by_the_next_audit():
    switch = [False]
    problem = behind_the_graph(lambda a: a if switch[0] else torch.zeros_like(a))
    loss = loss_of(problem, audit_every=3)
    loss.loss_and_grads(problem.model, problem.guide)
    switch[0] = True
    loss.loss_and_grads(problem.model, problem.guide)
    loss.loss_and_grads(problem.model, problem.guide)
    with pytest.warns(UserWarning, match="program order is used from here on"):
        loss.loss_and_grads(problem.model, problem.guide)
    assert loss.dependencies.refuted
    assert distance(moments(problem, loss)[0], exact_gradient(problem)) < 1e-10


def test_flags_among_the_arguments_belong_to_the_signature():
    logits = torch.zeros(2, dtype=torch.float64, requires_grad=True)

    def model(crossed):
        a, b = coin("a", number(0.2)), coin("b", number(0.2))
        observe("x", b if crossed else a, 0.4)
        observe("y", a if crossed else b, 0.4)

    def guide(crossed):
        coin("a", logits[0])
        coin("b", logits[1])

    loss = ScoreFunctionELBO(dependencies="tracked", max_plate_nesting=0)
    masks = []
    for crossed in (False, True, False):
        draws = loss.draws(model, guide, crossed)
        masks.append(draws.credit.influence(torch.eye(draws.fx.shape[-1], dtype=torch.float64)))
    assert torch.equal(masks[0], masks[2])
    assert not torch.equal(masks[0], masks[1])


def test_a_program_with_noise_of_its_own_keeps_to_program_order():
    generator = torch.Generator().manual_seed(0)
    logits, weight = parameters(2, (), seed=17)

    def model():
        a, b = coin("a", number(0.2)), coin("b", number(0.2))
        observe("x", weight * a + torch.rand((), generator=generator), 0.4)
        observe("y", weight * b, 0.4)

    def guide():
        coin("a", logits[0])
        coin("b", logits[1])

    loss = ScoreFunctionELBO(dependencies="tracked", max_plate_nesting=0)
    with pytest.warns(UserWarning, match="could not be audited.*moved though no decision was changed"):
        loss.loss_and_grads(model, guide)
    loss.loss_and_grads(model, guide)


def test_a_guide_that_runs_beside_the_model_keeps_to_program_order():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.4))

    with pyro.get_param_store().scope():
        guide = AutoNormalMessenger(model)
        guide()
        ScoreFunctionELBO(dependencies="tracked").loss_and_grads(model, guide)


def test_bad_arguments():
    with pytest.raises(sf.ScorefnError, match="dependencies must be .* but it is 'exact'"):
        ScoreFunctionELBO(dependencies="exact")
    with pytest.raises(sf.ScorefnError, match="audit_every"):
        ScoreFunctionELBO(dependencies="tracked", audit_every=0)


def test_the_layout_of_a_static_program_is_made_once():
    problem = independent()
    loss = loss_of(problem, dependencies="order")
    first, second = (loss.draws(problem.model, problem.guide).credit for _ in range(2))
    assert first.programs[0] is second.programs[0]
