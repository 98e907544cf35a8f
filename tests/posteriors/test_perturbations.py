"""The audit of all sites at once: every false claim is found, wherever vmap runs the program; otherwise it says so."""

import random

import pyro
import pyro.distributions as dist
import pytest
import torch

from scorefn.posteriors import ScoreFunctionELBO, perturbations
from scorefn.posteriors.perturbations import PinnedProgram, refutation
from tests.posteriors import problems
from tests.posteriors.problems import coin, number, observe


@pytest.fixture(autouse=True)
def seed():
    pyro.set_rng_seed(0)


def audited(program, reached, sites=None):
    return refutation(program, list(reached) if sites is None else sites, reached, program.factors({}, {}).keys())


def dag(num_sites, seed, site=coin):
    """A random program, and what each of its sites reaches: closed under composition."""
    generator = random.Random(seed)
    names = [f"z{i}" for i in range(num_sites)]
    into = {i: [k for k in range(i) if generator.random() < 0.4] for i in range(num_sites)}
    heard = {j: [k for k in range(num_sites) if generator.random() < 0.3] for j in range(num_sites)}

    def guide():
        drawn = []
        for i in range(num_sites):
            drawn.append(site(names[i], number(0.1 * i) + sum(0.7 * drawn[k] for k in into[i])))

    def model():
        drawn = [site(name, number(0.2)) for name in names]
        for j in range(num_sites):
            observe(f"x{j}", number(0.0) + sum(0.3 * drawn[k] for k in heard[j]), 0.4)

    reached = {}
    for i in reversed(range(num_sites)):
        own = {("log q", names[i]), ("log p", names[i])} | {("log p", f"x{j}") for j in heard if i in heard[j]}
        reached[names[i]] = own.union(*(reached[names[k]] for k in into if i in into[k]))
    return PinnedProgram(model, guide, (), {}), {name: frozenset(factors) for name, factors in reached.items()}


def real(name, loc):
    return pyro.sample(name, dist.Normal(loc, number(1.0)).has_rsample_(False))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("site", [coin, real])
def test_what_is_true_is_not_refuted(seed, site):
    program, reached = dag(6, seed, site)
    assert audited(program, reached) == ()


@pytest.mark.parametrize("site", [coin, real])
def test_every_dependence_that_a_map_leaves_out_is_found(site):
    """One observation at a time: no site is covered by another."""
    program, reached = dag(6, 1, site)
    tried = 0
    for name, factors in reached.items():
        for factor in sorted(factors):
            without = {  # and from all that reach this site, so that the map stays closed
                other: claimed - {factor} if other == name or ("log q", other) not in factors else claimed
                for other, claimed in reached.items()
            }
            without = {
                other: claimed - {factor} if ("log q", name) in claimed and other != name else claimed
                for other, claimed in without.items()
            }
            if factor[0] != "log p" or any(factor in without[i] for k, i in without[name] if k == "log q"):
                continue
            found = audited(program, without)
            assert found
            assert found[0][1] == factor
            tried += 1
    assert tried >= 6


def test_a_map_that_is_not_closed_is_not_judged():
    program, reached = dag(4, 0)
    reached = {"z0": reached["z0"] | {("log q", "z3")}, **{name: reached[name] for name in ("z1", "z2", "z3")}}
    reached["z0"] -= reached["z3"] - {("log q", "z3")}
    assert audited(program, reached) is None


def test_few_runs_however_many_sites():
    counts = []
    for num_sites in (3, 12):
        program, reached = dag(num_sites, 0)
        original, runs = program.factors, []
        program.factors = lambda *args, original=original, runs=runs: runs.append(None) or original(*args)
        assert audited(program, reached) == ()
        counts.append(len(runs))
    assert counts[0] == counts[1] <= 15


@pytest.mark.parametrize("most", [1, 100])
def test_in_pieces(monkeypatch, most):
    """A program too large for one run, and one too large for more than one setting."""
    monkeypatch.setattr(perturbations, "_MOST_ELEMENTS", most)
    monkeypatch.setattr(perturbations, "_MOST_WORK", 20 * most)
    program, reached = dag(4, 2)
    assert audited(program, reached) == ()
    lacking = {name: factors - {("log p", "x0"), ("log p", "x1")} for name, factors in reached.items()}
    assert audited(program, lacking)


def test_what_only_rounding_moved_is_run_again(monkeypatch):
    program, reached = dag(4, 0)
    row = perturbations._Row(0, frozenset(["z3"]))
    monkeypatch.setattr(perturbations, "_suspects", lambda *args: [(row, ("log q", "z0"))])
    assert audited(program, reached) == ()
    monkeypatch.setattr(perturbations, "_suspects", lambda *args: [(row, ("log p", "z3"))])
    assert audited(program, reached) == (("z3", ("log p", "z3")),)
    many = [(perturbations._Row(t, frozenset(["z3"])), ("log q", "z0")) for t in range(5)]
    monkeypatch.setattr(perturbations, "_suspects", lambda *args: many)
    assert audited(program, reached) is None


PLATES = [
    problems.plate,
    problems.local_first,
    problems.nested_small,
    problems.crossed,
    problems.masked,
    problems.event,
]


@pytest.mark.parametrize("make", [*PLATES, problems.subsampled, problems.mixed, problems.auxiliary])
def test_ordinary_programs_run_under_vmap(make):
    problem = make()
    program = PinnedProgram(problem.model, problem.guide, (), {})
    sites = [name for name, site in program.drawn({}).items() if type(site["fn"]).__name__ != "_Subsample"]
    everything = frozenset(program.factors({}, {}))
    assert audited(program, dict.fromkeys(sites, everything), sites) == ()
    nothing = {name: frozenset({("log q", name)}) for name in sites}
    assert audited(program, nothing, sites)


def one_of_two(pattern):
    """Two coins, of which the datum hears one through the pattern; the map says that it hears the other."""

    def guide():
        coin("a", number(0.1))
        coin("b", number(0.2))

    def model():
        a, b = coin("a", number(0.3)), coin("b", number(0.4))
        observe("x", pattern(a) + b, 0.4)

    own = {name: {("log q", name), ("log p", name)} for name in "ab"}
    reached = {"a": frozenset(own["a"]), "b": frozenset(own["b"] | {("log p", "x")})}
    return PinnedProgram(model, guide, (), {}), reached


def falls(a):
    """0.1 where the matrix is not positive, which vmap finds out for all rows together."""
    try:
        torch.linalg.cholesky(torch.stack([a - 0.5, number(0.0), number(0.0), number(1.0)]).reshape(2, 2))
    except RuntimeError:
        return 0.1
    return 0.7


def test_an_exception_that_the_program_catches_is_not_judged():
    program, reached = one_of_two(falls)
    assert audited(program, reached) is None


def test_noise_or_a_state_of_its_own_is_not_judged():
    generator, count = torch.Generator().manual_seed(0), [0]

    def counted(a):
        count[0] += 1
        return count[0]

    for pattern in (lambda a: torch.rand((), generator=generator), counted):
        program, reached = one_of_two(pattern)
        assert audited(program, reached) is None


def test_a_program_that_vmap_refuses_raises():
    for pattern in (lambda a: 1.0 if a else 0.0, lambda a: a.item()):
        program, reached = one_of_two(pattern)
        with pytest.raises(RuntimeError, match="vmap"):
            audited(program, reached)


def test_seeded_draws_of_the_program_are_the_same_in_all_rows():
    program, reached = one_of_two(lambda a: torch.rand(()))
    assert audited(program, reached) == ()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("shared", [True, False])
def test_it_is_the_audit_of_a_loss(shared):
    """A scripted function is invisible to tracking, and runs under vmap; its datum may seem to depend on nothing."""
    scripted = torch.jit.trace(lambda a: 2 * a + 0.1, number(1.0))
    logits = torch.zeros(2, dtype=torch.float64, requires_grad=True)

    def guide():
        coin("a", logits[0])
        coin("b", logits[1])

    def model():
        a, b = coin("a", number(0.3)), coin("b", number(0.4))
        observe("x", scripted(a) + (b if shared else 0.0), 0.4)

    loss = ScoreFunctionELBO(dependencies="tracked", max_plate_nesting=0)
    with pytest.warns(UserWarning, match='changed the guide site "a", and log p of site "x" moved'):
        loss.loss_and_grads(model, guide)
    assert loss.dependencies.refuted
