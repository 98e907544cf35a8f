"""What is kept of a program between runs."""

import warnings

import pytest
import torch
from torch.distributions import Bernoulli

import scorefn as sf
from scorefn.tracking import EscapeWarning
from tests.graph.programs import counting, logits, two_sites


def test_a_program_is_tracked_once_and_then_from_time_to_time(monkeypatch):
    entered, a, b = counting(monkeypatch), logits(3), logits(3, seed=1)
    g, runs = sf.StochasticGraph(4, audit_every=40), []
    for step in range(130):
        with g:
            two_sites(g, a, b)
        assert g.dependencies == {"first": ("z",), "second": ("z", "h")}
        if len(entered) > len(runs):
            runs.append(step)
    assert runs == [0, 16, 48, 88, 128]


def test_without_a_word_every_run_is_tracked():
    a, b = logits(3), logits(3, seed=1)
    g = sf.StochasticGraph(4)
    for step in range(6):
        with g:
            z, w = g.sample("z", Bernoulli(logits=a)), g.sample("w", Bernoulli(logits=b))
            g.cost("c", (z if step < 3 else w).sum(-1))
        assert g.dependencies == {"c": ("z",) if step < 3 else ("w",)}


def test_the_kept_map_gives_the_same_numbers():
    a, b = logits(3), logits(3, seed=1)
    kept, gradients = sf.StochasticGraph(4, audit_every=1000), []
    for g in (kept, kept, sf.StochasticGraph(4)):
        torch.manual_seed(3)
        with g:
            two_sites(g, a, b)
        gradients.append(torch.cat(torch.autograd.grad(g.surrogate().mean(), (a, b))))
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])


def test_sizes_may_change_between_runs(monkeypatch):
    entered, g = counting(monkeypatch), sf.StochasticGraph(4, audit_every=1000)
    for batch in (6, 6, 2):
        with g:
            z = g.sample("z", Bernoulli(logits=logits(batch, 3)))
            g.cost("c", g.sample("h", Bernoulli(logits=z), num_samples=batch).sum(-1))
        assert g.draws().fx.shape == (4, batch, batch)
    assert len(entered) == 1


def test_another_program_has_program_order_once_and_is_then_tracked(monkeypatch):
    entered, a, b = counting(monkeypatch), logits(3), logits(3, seed=1)
    g, found = sf.StochasticGraph(4, audit_every=1000), []
    for step in range(5):
        with g:
            z = g.sample("z", Bernoulli(logits=a))
            g.sample("w", Bernoulli(logits=b))
            g.cost("c", (z * a).sum(-1) if step < 2 else (z * a).prod(-1))
        found.append(g.dependencies["c"])
    assert found == [("z",), ("z",), ("z", "w"), ("z",), ("z",)]
    assert len(entered) == 2
    with torch.no_grad(), g:  # a value needs no map, and asks for none
        g.cost("c", (g.sample("z", Bernoulli(logits=a)) * a).prod(-1))
    assert g._programs._next > g._programs._run


def test_a_dependence_that_does_not_show_is_found_by_an_audit():
    a, b = logits(3), logits(3, seed=1)
    g = sf.StochasticGraph(4, audit_every=1000)
    for step in range(20):
        with g:
            z, w = g.sample("z", Bernoulli(logits=a)), g.sample("w", Bernoulli(logits=b))
            g.cost("c", (z if step < 3 else w).sum(-1))
        if step == 16:
            with pytest.warns(
                UserWarning, match="tracked anew, and a cost depends on a site that it did not depend on"
            ):
                assert g.dependencies == {"c": ("w",)}
        else:
            assert g.dependencies == {"c": ("z",) if step < 16 else ("w",)}


def test_nothing_is_kept_of_a_program_that_branches(monkeypatch):
    entered, g = counting(monkeypatch), sf.StochasticGraph(1, audit_every=1000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EscapeWarning)
        for _ in range(5):
            with g:
                z = g.sample("z", Bernoulli(logits=logits(1)[0]))
                g.cost("c", g.sample("h" if z.item() else "k", Bernoulli(logits=logits(1)[0])))
            assert next(iter(g.dependencies.values())) == ("z", "h" if z.item() else "k")
    assert len(entered) == 5


def test_an_escape_in_a_loop_is_told_once():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            with sf.StochasticGraph(1) as g:
                g.cost("c", torch.tensor([g.sample("z", Bernoulli(logits=logits(1)[0])).item()]))
    assert [each.category for each in caught] == [EscapeWarning]
    assert g.dependencies == {"c": ("z",)}


def test_declared_dependencies_are_used_as_they_are(monkeypatch):
    entered, a, b = counting(monkeypatch), logits(3), logits(3, seed=1)
    with sf.StochasticGraph(4, dependencies={"h": ["z"], "first": ["z"], "second": ["h"]}) as g:
        two_sites(g, a, b)
    assert g.dependencies == {"first": ("z",), "second": ("z", "h")}
    assert not entered
    with (
        pytest.raises(sf.ScorefnError, match="depends on 'k', which was not sampled before"),
        sf.StochasticGraph(4, dependencies={"h": ["k"]}) as g,
    ):
        two_sites(g, a, b)
