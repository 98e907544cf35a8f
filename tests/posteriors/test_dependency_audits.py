"""Audits of tracked dependencies, and what is kept of them."""

import threading

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormalMessenger

import scorefn as sf
from scorefn.posteriors import ScoreFunctionELBO
from tests.posteriors import problems
from tests.posteriors.dependency_programs import independent, loss_of, moments
from tests.posteriors.enumeration import Problem, distance, exact_gradient
from tests.posteriors.problems import coin, number, observe, parameters


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
