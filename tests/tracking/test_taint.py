"""Tracking: what depends is counted, whatever way it took; what stays in the graph is counted exactly."""

import gc
import random
import threading
import warnings

import pytest
import torch
from torch.distributions import Bernoulli, Categorical, Normal

from scorefn.tracking import EscapeWarning, Tracking
from tests.tracking.patterns import CLEAN, ESCAPES, KEPT, number
from tests.tracking.programs import EXACT, gradients, tracked, without_leak


@pytest.mark.parametrize("name", [*ESCAPES, *KEPT])
def test_the_gradient_with_the_tracked_mask_is_exact(name):
    exact, ours = gradients((ESCAPES | KEPT)[name], Tracking.influence_mask)
    assert (exact - ours).abs().max() < 1e-10
    _, leaked = gradients((ESCAPES | KEPT)[name], without_leak)
    assert (exact - leaked).abs().max() > 1e-2, "the leak has no effect: nothing is tested"


@pytest.mark.parametrize("z", [0.0, 1.0])
@pytest.mark.parametrize("name", KEPT)
def test_what_stays_in_the_graph_is_counted_exactly_and_in_silence(name, z):
    t, caught = tracked(KEPT[name], z=z, w=1.0)
    assert not caught
    assert not t.escapes
    assert torch.equal(t.influence_mask(), EXACT)


@pytest.mark.parametrize("z", [0.0, 1.0])
@pytest.mark.parametrize("name", ESCAPES)
def test_an_escape_is_charged_with_everything_later_and_warned_of_once(name, z):
    t, caught = tracked(ESCAPES[name], z=z, w=1.0)
    assert torch.equal(t.influence_mask(), EXACT | torch.tensor([[False, True, True, True], [False] * 4]))
    (escape,), (warning,) = t.escapes, caught
    assert escape.decisions == ("z",)
    assert escape.filename == warning.filename
    assert escape.filename.endswith("patterns.py")
    assert escape.line == warning.lineno
    assert "'z'" in str(warning.message)
    assert escape.kind in str(warning.message)


@pytest.mark.parametrize("z", [0.0, 1.0])
@pytest.mark.parametrize("name", CLEAN)
def test_what_does_not_depend_is_not_counted(name, z):
    with warnings.catch_warnings(), Tracking() as t:
        warnings.simplefilter("error")
        decision = t.decision("z", number(z))
        assert t.dependencies(CLEAN[name](decision)) == frozenset()


def test_the_warning_names_the_line_that_did_it():
    with Tracking() as t:
        z = t.decision("z", torch.tensor(1.0))
        with pytest.warns(EscapeWarning, match=r"'z' left the tensor graph by \.item\(\).*later.*torch\.where"):
            z.item()
        z.item()  # and only once
        w = t.decision("w", torch.tensor(1.0))
        with pytest.warns(EscapeWarning, match="'w'"):
            bool(z * w)
    assert [(escape.decisions, escape.kind) for escape in t.escapes] == [(("z",), ".item()"), (("w",), "bool()")]
    assert t.escapes[0].filename == __file__


def test_a_value_registered_before_an_escape_stays_sharp():
    with Tracking() as t:
        z, w = (t.decision(name, torch.tensor(1.0)) for name in "zw")
        value = w * 2
        assert t.dependencies(value) == {"w"}
        with pytest.warns(EscapeWarning):
            bool(z)
        assert t.dependencies(value) == {"z", "w"}  # it may have been picked by z
        assert t.dependencies(3.0) == {"z"}
        assert t.dependencies(torch.ones(2)) == {"z"}
        assert t.dependencies(t.decision("u", torch.tensor(0.0))) == {"z", "u"}


# ------------------------------------------------------------------------------------------------- decisions


def test_a_decision_inherits_what_its_distribution_depends_on():
    with Tracking() as t:
        z = t.decision("z", torch.tensor(1.0))
        drawn = t.decision("drawn", Normal(z, 1.0).sample())
        given = t.decision("given", torch.tensor(0.3), given=Normal(z, 1.0).log_prob(torch.tensor(0.3)))
        alone = t.decision("alone", torch.tensor(0.3))
        assert t.dependencies(drawn) == {"z", "drawn"}
        assert t.dependencies([given, {"a": alone}]) == {"z", "given", "alone"}
        assert t.dependencies(alone) == {"alone"}
    assert t.decisions == ("z", "drawn", "given", "alone")


def test_decisions_taken_from_one_tensor_are_kept_apart_and_the_original_counts_as_all():
    with Tracking() as t:
        x = torch.tensor([1.0, 2.0, 3.0])
        parts = [t.decision(f"x[{i}]", x[i]) for i in range(3)]
        assert [t.dependencies(part * 2) for part in parts] == [{"x[0]"}, {"x[1]"}, {"x[2]"}]
        assert t.dependencies(x.sum()) == {"x[0]", "x[1]", "x[2]"}
    assert torch.equal(torch.stack(parts), x)


def test_one_constant_can_be_the_value_of_two_decisions():
    one = torch.tensor(1.0)
    with Tracking() as t:
        z, w = t.decision("z", one), t.decision("w", one)
        assert (t.dependencies(z + 0), t.dependencies(w + 0)) == ({"z"}, {"w"})


def test_rows_chosen_from_one_table_are_kept_apart():
    table = torch.arange(6.0).reshape(3, 2)
    with Tracking() as t:
        z, w = t.decision("z", torch.tensor(1)), t.decision("w", torch.tensor(1))
        first, second, third = table[z], table[w], table[1]
        assert [t.dependencies(row.sum()) for row in (first, second, third, table)] == [{"z"}, {"w"}, set(), set()]
        assert t.dependencies(first[0] + third[0]) == {"z"}
        first.zero_()  # writes into the table
        assert t.dependencies(third) == {"z"}


def test_memory_that_is_used_again_is_clean():
    with Tracking() as t:
        z = t.decision("z", torch.tensor(1.0))
        for _ in range(50):
            tainted = torch.zeros(1000) + z
            del tainted
            assert t.dependencies(torch.zeros(1000)) == frozenset()
        kept = (torch.ones(3) * z).requires_grad_()
        chain = kept * kept
        del kept
        gc.collect()
        assert t.dependencies(chain.grad_fn._saved_self) == {"z"}
    assert not t._taint.memories


def test_requires_grad_passes_through():
    theta = torch.tensor(0.3, requires_grad=True)
    with Tracking() as t:
        z = t.decision("z", Normal(theta, 1.0).rsample())
        y = (z * 2).square()
        assert t.dependencies(y) == {"z"}
        with torch.no_grad():
            assert t.dependencies(t.decision("w", theta + 1) * 3) == {"w"}
    assert torch.autograd.grad(y, theta)[0] == 8 * z
    assert type(z) is torch.Tensor


@pytest.mark.parametrize("pinned", [0.0, 1.0])
def test_a_pinned_decision_takes_the_place_of_the_draw(pinned):
    with Tracking({"z": torch.tensor(pinned)}) as t:
        z = t.decision("z", Bernoulli(0.5).sample())
    assert z == pinned
    assert t.decisions == ("z",)


def test_order_counts_every_decision_before_the_value():
    with Tracking(dependencies="order") as t:
        t.value("first", torch.ones(()))
        z = t.decision("z", torch.tensor(1.0))
        t.value("second", torch.ones(()))
        assert bool(z)  # no escape, no warning
        t.decision("w", torch.tensor(1.0))
        assert t.dependencies(3.0) == {"z", "w"}
        t.value("third", 3.0)
    assert torch.equal(t.influence_mask(), torch.tensor([[False, True, True], [False, False, True]]))
    assert t.values == ("first", "second", "third")


def test_checking_reads_without_escape():
    with Tracking() as t:
        z = t.decision("z", torch.tensor(1.0))
        with t.checking():
            assert torch.isfinite(z).all()
        assert t.dependencies(torch.ones(2)) == frozenset()


def test_validation_of_distributions_is_no_escape_and_a_rejection_loop_is():
    with Tracking() as t:
        z = t.decision("z", torch.tensor(1.0))
        Categorical(probs=torch.stack([z, z + 1])).log_prob(torch.tensor(1))
        assert not t.escapes
        with pytest.warns(EscapeWarning):
            torch.distributions.VonMises(torch.tensor(0.0), z).sample()


# ------------------------------------------------------------------------------------------------ blocks


def test_blocks_nest_and_know_their_own_decisions():
    with Tracking() as outer:
        z = outer.decision("z", torch.tensor(1.0))
        with Tracking() as inner:
            w = inner.decision("w", z * 2)
            assert inner.dependencies(w + z) == {"w"}
            assert outer.dependencies(w + z) == {"z"}
            m = torch.zeros(2)
            m[0] = w
            with pytest.warns(EscapeWarning) as caught:
                bool(m[0])
        assert outer.dependencies(m) == {"z"}
    assert len(caught) == 2
    assert (inner.escapes[0].decisions, outer.escapes[0].decisions) == (("w",), ("z",))


def test_threads_have_blocks_of_their_own():
    failures = []

    def work(seed):
        try:
            with Tracking() as t:
                names = [f"z{seed}.{i}" for i in range(20)]
                decisions = [t.decision(name, torch.tensor(float(seed))) for name in names]
                for name, z in zip(names, decisions, strict=True):
                    assert t.dependencies(torch.exp(z) * 2) == {name}
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_nothing_is_left_behind():
    before = {name: getattr(torch.Tensor, name) for name in ("__bool__", "item", "__setitem__")}
    generator = torch.get_rng_state()
    with Tracking() as t:
        t.decision("z", torch.tensor(1.0))
    assert {name: getattr(torch.Tensor, name) for name in before} == before
    assert torch.equal(torch.get_rng_state(), generator)
    assert not torch.overrides._get_current_function_mode_stack()


def test_a_block_that_fails_is_closed():
    t = Tracking()
    with pytest.raises(KeyError), t:
        raise KeyError
    assert not torch.overrides._get_current_function_mode_stack()


def test_random_programs_are_never_under_counted():
    """Three hundred random programs: what a perturbation moves is among the dependencies."""
    choose = random.Random(5)
    steps = [
        lambda a, b: a + b,
        lambda a, b: a * b,
        lambda a, b: torch.where(a > b, a, b),
        lambda a, b: torch.stack([a, b])[(a > 0).long()],
        lambda a, b: torch.stack([a, b]).max(),
        lambda a, b: a.clone().add_(b),
        lambda a, b: torch.cat([a[None], b[None]]).flip(0)[0],
        lambda a, b: torch.add(a, b, out=torch.empty_like(a)),
        lambda a, b: a if b > 0 else a.neg(),
        lambda a, b: a * 0.5,
        lambda a, b: torch.arange(4.0)[(b > 0).long() :].sum() + a,
    ]
    for _ in range(300):
        recipe = [(choose.choice(steps), choose.random(), choose.random()) for _ in range(6)]

        def run(values, recipe=recipe):
            with warnings.catch_warnings(), Tracking() as t:
                warnings.simplefilter("ignore", EscapeWarning)
                pool = [t.decision(name, value) for name, value in values.items()]
                seen = []
                for step, i, j in recipe:
                    pool.append(step(pool[int(i * len(pool))], pool[int(j * len(pool))]))
                    seen.append((pool[-1].clone(), t.dependencies(pool[-1])))
            return seen

        base = {name: torch.tensor(choose.choice([-1.0, 1.0])) for name in "abc"}
        before = run(base)
        for name in base:
            after = run({**base, name: -base[name]})
            for (x, counted), (y, _) in zip(before, after, strict=True):
                assert x == y or name in counted
