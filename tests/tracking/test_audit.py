"""The perturbation audit: refutes what is false, raises no false alarm, refuses what it could not judge."""

import itertools
import random
import warnings

import numpy as np
import pytest
import torch
from torch.distributions import Bernoulli, Normal

import scorefn as sf
from scorefn.tracking import EscapeWarning, Tracking, audit
from tests.tracking.patterns import CLEAN, ESCAPES, INVISIBLE, KEPT, number
from tests.tracking.programs import EXACT, program, without_leak

SUPPORTS = {"z": torch.tensor([0.0, 1.0]).double(), "w": torch.tensor([0.0, 1.0]).double()}
PATTERNS = ESCAPES | KEPT | INVISIBLE


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EscapeWarning)
        yield


def of(pattern):
    return lambda ledger: program(ledger, pattern)


@pytest.mark.parametrize("name", PATTERNS)
def test_every_leak_is_refuted_and_nothing_else(name):
    report = audit(of(PATTERNS[name]), without_leak(None), supports=SUPPORTS, trials=1, exhaustive=True)
    assert not report
    assert report.exhaustive
    assert report.refuted == (("z", "leaky"), ("z", "both"))
    assert torch.equal(report.moved, EXACT)


@pytest.mark.parametrize("name", ESCAPES | KEPT)
def test_no_false_alarm(name):
    report = audit(of(PATTERNS[name]), EXACT, trials=6)
    assert report
    assert report.refuted == ()
    assert not (report.moved & ~EXACT).any()


@pytest.mark.parametrize("name", CLEAN)
def test_what_does_not_depend_does_not_move(name):
    claimed = without_leak(None)
    report = audit(of(CLEAN[name]), EXACT, supports=SUPPORTS, trials=1, exhaustive=True)
    assert report
    assert report.unproven == (("z", "leaky"), ("z", "both"))
    assert torch.equal(report.moved, claimed)


def chain(ledger):
    """`a` moves the distribution of `b`, which alone moves `cost`; `c` stands apart."""
    a = ledger.decision("a", Bernoulli(0.5).sample())
    q = Bernoulli(0.2 + 0.6 * a)
    b = ledger.decision("b", q.sample(), given=q.probs)
    c = ledger.decision("c", Bernoulli(0.5).sample(), given=0.5)
    ledger.value("cost", 3 * b)
    ledger.value("apart", c + 1)


TRUE_CHAIN = torch.tensor([[True, False], [True, False], [False, True]])


@pytest.mark.parametrize("exhaustive", [False, True])
def test_influence_through_a_decision_counts(exhaustive):
    supports = {name: torch.tensor([0.0, 1.0]) for name in "abc"} if exhaustive else None
    with Tracking() as t:
        chain(t)
    assert torch.equal(t.influence_mask(), TRUE_CHAIN)
    report = audit(chain, t.influence_mask(), supports=supports, exhaustive=exhaustive)
    assert report
    assert torch.equal(report.moved, TRUE_CHAIN)
    direct = torch.tensor([[False, False], [True, False], [False, True]])
    assert audit(chain, direct, supports=supports, exhaustive=exhaustive).refuted == (("a", "cost"),)


def test_influence_through_many_decisions_counts():
    def long(ledger):
        z = ledger.decision("z[0]", torch.randn(()))
        for i in range(1, 5):
            ledger.value(f"f[{i}]", z * 2)
            z = ledger.decision(f"z[{i}]", Normal(z, 1.0).sample(), given=z)

    expected = torch.ones(5, 4, dtype=torch.bool).triu()
    assert torch.equal(audit(long, trials=2).moved, expected)
    with Tracking() as t:
        long(t)
    assert torch.equal(t.influence_mask(), expected)


def test_a_draw_that_only_shifts_in_the_stream_of_random_numbers_is_no_dependence():
    def shifting(ledger):
        z = ledger.decision("z", Bernoulli(0.5).sample())
        if z:
            torch.rand(7)
        w = ledger.decision("w", torch.randn(3), given=())
        v = ledger.decision("v", torch.randn(3), given=torch.zeros(1))
        ledger.value("f", v.sum())
        ledger.value("g", w.sum())

    assert audit(shifting).moved.tolist() == [[False, True], [False, True], [True, False]]


def test_without_given_the_draw_tells():
    def ungiven(ledger):
        a = ledger.decision("a", torch.randn(3))
        b = ledger.decision("b", Normal(a, 1.0).sample())
        ledger.value("cost", b.sum())

    assert torch.equal(audit(ungiven, trials=2).moved, torch.ones(2, 1, dtype=torch.bool))


def test_a_dependence_that_shows_rarely_needs_the_exhaustive_audit():
    def rare(ledger):
        z = [ledger.decision(f"z[{i}]", Bernoulli(0.5).sample(), given=0.5) for i in range(8)]
        ledger.value("all", torch.stack(z).prod())
        ledger.value("first", z[0])

    claimed = torch.zeros(8, 2, dtype=torch.bool)
    claimed[:4] = claimed[0, 1] = True
    claimed[1:, 1] = False
    supports = {f"z[{i}]": torch.tensor([0.0, 1.0]) for i in range(8)}
    report = audit(rare, claimed, trials=1, supports=supports, exhaustive=True)
    assert report.refuted == tuple((f"z[{i}]", "all") for i in range(4, 8))
    assert report.runs == 2 * 2**8
    assert audit(rare, claimed, trials=1)  # (1 - p)^1, p = 2^-7: it escapes a single trial


def test_the_others_are_held_while_one_is_changed():
    """Each value reads one decision, and each decision is put back before the next is changed."""

    def diagonal(ledger):
        for i in range(5):
            ledger.value(f"f[{i}]", ledger.decision(f"z[{i}]", torch.randn(2)) * 2)

    assert torch.equal(audit(diagonal, trials=3).moved, torch.eye(5, dtype=torch.bool))


def test_values_of_any_kind_are_compared():
    def kinds(ledger):
        z = ledger.decision("z", Bernoulli(0.5).sample())
        n = int(z)
        ledger.value("number", n)
        ledger.value("numpy", np.full(2, float(n)))
        ledger.value("nested", {"a": [torch.ones(2), n]})
        ledger.value("sparse", (torch.eye(2) * (n + 1)).to_sparse())
        ledger.value("shape", torch.zeros(n))
        ledger.value("nan", torch.tensor([torch.nan, 1.0]))
        ledger.value("zero", 0.0 * (z - 0.5))  # only the sign of zero moves
        ledger.value("nothing", None)

    report = audit(kinds, trials=4)
    assert report.moved.tolist() == [[True, True, True, True, True, False, False, False]]


def test_decisions_and_values_that_come_and_go():
    def branching(ledger):
        z = ledger.decision("z", Bernoulli(0.5).sample())
        if z:
            ledger.value("only then", ledger.decision("w", torch.randn(())) * 2)
        ledger.value("always", torch.ones(()))

    report = audit(branching, trials=8)
    named = {(k, j) for k, j in itertools.product(report.decisions, report.values) if report.moved[
        report.decisions.index(k), report.values.index(j)]}  # fmt: skip
    assert named == {("z", "only then"), ("w", "only then")}


def test_a_pinned_decision_may_be_changed_in_place():
    def in_place(ledger):
        z = ledger.decision("z", torch.ones(2) * torch.randn(()))
        z.mul_(0.5)
        w = ledger.decision("w", torch.randn(2))
        ledger.value("f", z.sum())
        ledger.value("g", w.sum())

    assert torch.equal(audit(in_place).moved, torch.eye(2, dtype=torch.bool))


# ------------------------------------------------------------------------------------------------- randomness


def with_noise(draw):
    def noisy(ledger):
        z = ledger.decision("z", Bernoulli(0.5).sample())
        ledger.value("of z", z + draw())
        ledger.value("noise", torch.as_tensor(draw()))

    return noisy


GLOBAL = {
    "torch": lambda: torch.randn(()),
    "numpy": lambda: np.random.normal(),
    "random": lambda: random.gauss(0.0, 1.0),
    "seeded": lambda: torch.randn((), generator=torch.Generator().manual_seed(3)),
}
_own = torch.Generator().manual_seed(0)
_count = itertools.count()
HIDDEN = {
    "own generator": lambda: torch.randn((), generator=_own),
    "numpy generator": lambda: np.random.default_rng().normal(),
    "system": lambda: random.SystemRandom().random(),
    "counter": lambda: next(_count),
}


@pytest.mark.parametrize("name", GLOBAL)
def test_noise_from_the_global_generators_is_pinned_and_they_are_restored(name):
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    report = audit(with_noise(GLOBAL[name]), torch.tensor([[True, False]]))
    assert report
    assert not report.unproven
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]
    assert random.getstate() == states[2]


@pytest.mark.parametrize("exhaustive", [False, True])
@pytest.mark.parametrize("name", HIDDEN)
def test_hidden_randomness_is_refused(name, exhaustive):
    supports = {"z": torch.tensor([0.0, 1.0])}
    state = torch.get_rng_state()
    with pytest.raises(sf.ScorefnError, match=r"moved though no decision was changed.*Draw it as a decision.*seeds"):
        audit(with_noise(HIDDEN[name]), supports=supports, exhaustive=exhaustive)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_state_that_shows_only_later_is_refused():
    runs = itertools.count()

    def ageing(ledger):
        ledger.decision("z", Bernoulli(0.5).sample())
        ledger.value("f", float(next(runs) > 1))

    with pytest.raises(sf.ScorefnError, match="state of its own"):
        audit(ageing)


def test_a_draw_that_cannot_be_repeated_is_refused_unless_its_distribution_is_given():
    def program_of(given):
        def drawn(ledger):
            z = ledger.decision("z", torch.randn((), generator=_own), given=given)
            ledger.value("f", z * 2)

        return drawn

    with pytest.raises(sf.ScorefnError, match="draw of the decision 'z'"):
        audit(program_of(()))
    assert audit(program_of(torch.tensor(0.3)), torch.tensor([[True]])).unproven == ()


def test_the_audit_repeats_itself_from_one_seed():
    torch.manual_seed(4)
    first = audit(of(KEPT["where"]), trials=2)
    torch.manual_seed(4)
    second = audit(of(KEPT["where"]), trials=2)
    assert (first.moved == second.moved).all()
    assert first.runs == second.runs


# ------------------------------------------------------------------------------------------------- refusals


def one(ledger):
    ledger.value("f", ledger.decision("z", torch.randn(())))


ONE = torch.ones(1, 1, dtype=torch.bool)
REFUSALS = [
    ("trials", lambda: audit(one, trials=0), sf.ScorefnError, ["trials", "0", "at least 1"]),
    ("float trials", lambda: audit(one, trials=2.0), sf.ScorefnError, ["trials", "2.0"]),
    ("float claim", lambda: audit(one, torch.ones(1, 1)), sf.ScorefnError, ["bool", "float32"]),
    ("listed claim", lambda: audit(one, [[True]]), sf.ScorefnError, ["bool", "list"]),
    ("flat claim", lambda: audit(one, ONE[0]), sf.ShapeError, ["(1,)", "'z'", "'f'", "row", "column"]),
    ("wide claim", lambda: audit(one, ONE.expand(1, 2)), sf.ShapeError, ["(1, 2)", "K = 1", "J = 1"]),
    ("nothing", lambda: audit(lambda ledger: None), sf.ScorefnError, ["0 decisions", "value()"]),
    ("no supports", lambda: audit(one, exhaustive=True), sf.ScorefnError, ["support of 'z'", "exhaustive=False"]),
    (
        "too many",
        lambda: audit(one, supports={"z": torch.zeros(10**6)}, exhaustive=True),
        sf.ScorefnError,
        ["1000000 settings", "100000", "smaller"],
    ),
    ("no support", lambda: audit(one, supports={"z": torch.ones(())}), sf.ScorefnError, ["[S, *shape]", "()"]),
    ("listed support", lambda: audit(one, supports={"z": [0, 1]}), sf.ScorefnError, ["[S, *shape]", "list"]),
    ("integers", lambda: audit(one, supports={"z": torch.tensor([0, 1])}), sf.ScorefnError, ["'z'", "int64"]),
    ("shape", lambda: audit(one, supports={"z": torch.ones(2, 2)}), sf.ShapeError, ["'z'", "(2,)", "()"]),
]


@pytest.mark.parametrize(("call", "error", "patterns"), [c[1:] for c in REFUSALS], ids=[c[0] for c in REFUSALS])
def test_refusals(call, error, patterns):
    state = torch.get_rng_state()
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    assert all(pattern in str(caught.value) for pattern in patterns), str(caught.value)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_error_of_the_program_is_raised_as_it_is_with_the_setting_as_a_note():
    def failing(ledger):
        ledger.decision("z", number(1.0))
        raise KeyError("gone")

    with pytest.raises(KeyError) as caught:
        audit(failing)
    assert "'z': 1.0" in caught.value.__notes__[0]


def test_how_many_random_numbers_a_decision_uses_up_is_no_influence():
    """A Poisson sampler of another rate takes more or fewer numbers from the generator than before."""

    def program(ledger):
        z = ledger.decision("z", torch.bernoulli(torch.tensor(0.5)))
        ledger.value("a", z + torch.poisson(10 + 100 * z.expand(3)).sum())
        ledger.value("b", torch.randn(()))

    report = audit(program, torch.tensor([[True, False]]))
    assert report
    assert report.refuted == ()
    assert not report.unproven


def test_hidden_randomness_on_one_branch_is_refused():
    def branching(ledger):
        z = ledger.decision("z", Bernoulli(0.5).sample())
        ledger.value("f", z + random.SystemRandom().random() if z else z)

    with pytest.raises(sf.ScorefnError, match="'f' moved though no decision was changed"):
        audit(branching, supports={"z": torch.tensor([0.0, 1.0])}, trials=1, exhaustive=True)


def test_an_exhaustive_audit_asks_what_each_decision_is_given():
    """One draw of the second would be the same from both distributions, under nearly every seed."""

    def nearly_alike(ledger, **given):
        z = ledger.decision("z", Bernoulli(0.5).sample())
        p = Bernoulli(0.5 + 1e-9 * z.double())
        w = ledger.decision("w", p.sample(), **dict.fromkeys(given, p.probs))
        ledger.value("f", 2 * w)

    supports = {"z": torch.tensor([0.0, 1.0]), "w": torch.tensor([0.0, 1.0]).double()}
    with pytest.raises(sf.ScorefnError, match=r"'w' was registered without given=.*one draw.*exhaustive=False"):
        audit(nearly_alike, supports=supports, exhaustive=True)
    report = audit(lambda ledger: nearly_alike(ledger, given=True), supports=supports, trials=1, exhaustive=True)
    assert report.moved.all()
