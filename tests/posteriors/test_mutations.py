"""What the certificate can see: each of these mistakes moves the expected gradient, visibly."""

from dataclasses import replace

import pytest
import torch

from scorefn.posteriors import ScoreFunctionELBO, particles, plate_sums, programs, score_function_elbo, traces
from tests.posteriors import problems
from tests.posteriors.enumeration import distance, exact_gradient, expected_gradient, second_derivative_error

VISIBLE = 1e-3


@pytest.fixture(autouse=True)
def layouts_made_anew():
    """A mutation must reach what is kept for the next run of a program, and leave nothing behind."""
    particles._layout.cache_clear()
    yield
    particles._layout.cache_clear()


def error(problem, num_particles=1, **options):
    loss = ScoreFunctionELBO(
        num_particles, max_plate_nesting=problem.nesting, vectorize_particles=problem.batched, **options
    )
    return distance(expected_gradient(problem, loss), exact_gradient(problem))


def mutate_runs(monkeypatch, change):
    """Let ``change(stage index, stage) -> stage`` loose on every run that the loss reads."""

    def mutated(*args):
        run = traces.read_run(*args)
        return replace(run, stages=[change(index, stage) for index, stage in enumerate(run.stages)])

    monkeypatch.setattr(score_function_elbo, "read_run", mutated)


def without(*kinds):
    return lambda _, stage: replace(stage, values=[value for value in stage.values if value.key[0] not in kinds])


def later_model_factors_only(index, stage):
    """Take program order from the model alone: log p(a) comes before b is met there."""
    return replace(stage, values=[value for value in stage.values if value.key[:2] != ("log p", "a")])


def scaled_score(_, stage):
    if stage.decision is None:
        return stage
    return replace(stage, decision=replace(stage.decision, value=3 * stage.decision.value))


class OwnMean:
    """A baseline that includes its own draw."""

    unbiased = False

    def __call__(self, signal, draws):
        return signal.mean(0, keepdim=True).expand(signal.shape)


@pytest.mark.parametrize("make", [problems.single, problems.plate, problems.auxiliary])
def test_without_log_q(make, monkeypatch):
    mutate_runs(monkeypatch, without("log q"))
    assert error(make()) > VISIBLE


def test_scale_on_the_score(monkeypatch):
    mutate_runs(monkeypatch, scaled_score)
    assert error(problems.subsampled()) > VISIBLE


def test_mask_on_the_score(monkeypatch):
    def masked_score(_, stage):
        if stage.decision is None or stage.decision.key[1] != "z":
            return stage
        value = torch.where(torch.tensor([True, False]), stage.decision.value, 0.0)
        return replace(stage, decision=replace(stage.decision, value=value))

    mutate_runs(monkeypatch, masked_score)
    assert error(problems.masked()) > VISIBLE


def test_scale_left_out_of_the_values(monkeypatch):
    mutate_runs(
        monkeypatch,
        lambda _, stage: replace(
            stage, values=[replace(v, value=v.value / 3) if v.plates else v for v in stage.values]
        ),
    )
    assert error(problems.subsampled()) > VISIBLE


def test_order_of_the_model_alone(monkeypatch):
    mutate_runs(monkeypatch, later_model_factors_only)
    assert error(problems.swapped()) > VISIBLE


def test_a_site_without_its_own_value(monkeypatch):
    mutate_runs(monkeypatch, lambda index, stage: replace(stage, values=[]) if index == 1 else stage)
    assert error(problems.plate()) > VISIBLE


@pytest.mark.parametrize("make", [problems.local_first, problems.crossed])
def test_plates_that_forget_what_was_sampled_between(make, monkeypatch):
    monkeypatch.setattr(programs.Relations, "kept", lambda self, shared, carriers: shared)
    assert error(make()) > VISIBLE


def test_plates_known_by_their_dimension_alone(monkeypatch):
    original = traces._plates
    monkeypatch.setattr(traces, "_plates", lambda site: frozenset(p._replace(name="any") for p in original(site)))
    assert error(problems.foreign()) > VISIBLE


@pytest.mark.parametrize("make", [problems.local_first, problems.nested, problems.crossed])
def test_without_the_values_outside_the_plate(make, monkeypatch):
    original = programs.influence_links

    def of_the_same_plates(relations):
        for link in original(relations):
            inside = [at for at in plate_sums.bits(link.sources) if link.blocks[at].plates == link.target.plates]
            yield link._replace(sources=sum(1 << at for at in inside))

    monkeypatch.setattr(programs, "influence_links", of_the_same_plates)
    assert error(make()) > VISIBLE


@pytest.mark.parametrize("make", [problems.plate, problems.local_first, problems.branch])
def test_rewards_to_go_off_by_one(make, monkeypatch):
    """Each site is charged with the values of the site before it, too, and not with the last."""
    original = programs.Relations

    def late(program):
        empty = replace(program.steps[-1], decision=None, factors=())
        pairs = zip((empty, *program.steps[:-1]), program.steps, strict=True)
        shifted = tuple(replace(step, factors=before.factors) for before, step in pairs)
        return original(replace(program, steps=shifted))

    monkeypatch.setattr(programs, "Relations", late)
    assert error(make()) > VISIBLE


def test_dice_with_log_q_held_constant(monkeypatch):
    """The first derivative does not notice; the second misses the Fisher information."""
    problem = problems.plate()
    assert second_derivative_error(problem) < 1e-10
    monkeypatch.setattr(traces, "_silent", lambda log_q: log_q - log_q.detach())
    assert error(problem) < 1e-10
    assert second_derivative_error(problem) > VISIBLE


@pytest.mark.parametrize("make", [problems.single, problems.nested_small])
def test_a_baseline_with_its_own_draw(make):
    assert error(make(), 2, baseline=OwnMean()) > VISIBLE
