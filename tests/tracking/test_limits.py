"""What tracking cannot see, and what it refuses."""

import warnings

import pytest
import torch
from torch import nn
from torch.distributions import Normal

import scorefn as sf
from scorefn.tracking import EscapeWarning, Tracking
from tests.tracking.patterns import INVISIBLE
from tests.tracking.programs import program, tracked, without_leak


@pytest.mark.parametrize("name", INVISIBLE)
def test_what_torch_does_not_show_is_refuted_by_the_audit(name):
    t, _ = tracked(INVISIBLE[name], z=1.0, w=1.0)
    assert torch.equal(t.influence_mask(), without_leak(t))
    report = sf.tracking.audit(lambda ledger: program(ledger, INVISIBLE[name]), t.influence_mask())
    assert not report
    assert report.refuted == (("z", "leaky"), ("z", "both"))


def used_outside(t):
    with t:
        pass
    t.dependencies(torch.ones(1))


def entered_twice(t):
    with t:
        pass
    with t:
        pass


def inside(call):
    def block(t):
        with t:
            call(t)

    return block


ONE = torch.tensor(1.0)
REFUSALS = [
    ("closed", used_outside, sf.ScorefnError, ["not open", "with Tracking"]),
    ("never opened", lambda t: t.decision("z", ONE), sf.ScorefnError, ["not open"]),
    ("twice", entered_twice, sf.ScorefnError, ["entered before", "new"]),
    ("number", inside(lambda t: t.decision("z", 1.0)), sf.ScorefnError, ["'z'", "float", "as_tensor"]),
    ("no name", inside(lambda t: t.decision(ONE, ONE)), sf.ScorefnError, ["name", "string"]),
    ("name taken", inside(lambda t: [t.decision("z", ONE) for _ in "ab"]), sf.ScorefnError, ["'z'", "twice", "loop"]),
    ("value taken", inside(lambda t: [t.value("f", ONE) for _ in "ab"]), sf.ScorefnError, ["'f'", "twice"]),
    ("sparse", inside(lambda t: t.decision("z", torch.eye(2).to_sparse())), sf.ScorefnError, ["sparse", "dense"]),
    ("object", inside(lambda t: t.dependencies(object())), sf.ScorefnError, ["object", "tensors"]),
    ("distribution", inside(lambda t: t.decision("z", ONE, given=Normal(0, 1))), sf.ScorefnError, ["Normal", "log-"]),
    ("nothing", lambda t: t.influence_mask(), sf.ScorefnError, ["0 decisions", "value()"]),
]


@pytest.mark.parametrize(("call", "error", "patterns"), [c[1:] for c in REFUSALS], ids=[c[0] for c in REFUSALS])
def test_refusals(call, error, patterns):
    with pytest.raises(error) as caught:
        call(Tracking())
    assert all(pattern in str(caught.value) for pattern in patterns), str(caught.value)
    assert not torch.overrides._get_current_function_mode_stack()


@pytest.mark.parametrize(
    ("pinned", "error"),
    [(torch.ones(2), sf.ShapeError), (torch.tensor(1), sf.ScorefnError), (1.0, sf.ScorefnError)],
)
def test_a_pinned_value_that_does_not_fit(pinned, error):
    with pytest.raises(error, match="'z'"), Tracking({"z": pinned}) as t:
        t.decision("z", ONE)


def test_unknown_way_to_depend():
    with pytest.raises(sf.ScorefnError, match='"tracked" or "order"'):
        Tracking(dependencies="provenance")


def test_modules_with_state_and_buffers_stay_themselves():
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    with Tracking() as t:
        z = t.decision("z", torch.randn(4, 2))
        assert t.dependencies(module(z)) == {"z"}
        assert t.dependencies(module[0].weight) == frozenset()
        assert t.dependencies(module[1].running_mean) == {"z"}
    assert all(type(p) is nn.Parameter for p in module.parameters())


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_a_nested_tensor_depends_on_what_was_decided_before_it_was_met(layout):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # nested tensors are a prototype
        with Tracking() as t:
            z = t.decision("z", torch.ones(2))
            nested = torch.nested.nested_tensor([z, torch.ones(3)], layout=layout)
            part = nested.unbind()[0]
            w = t.decision("w", torch.ones(2))
            assert t.dependencies(nested) >= {"z"}
            assert t.dependencies(part) == {"z"}
            assert t.dependencies(part.sum() + 1) == {"z"}
            assert t.dependencies(w) == {"w"}


def test_the_parts_of_a_complex_tensor_are_seen_through_its_real_view():
    with Tracking() as t:
        z = t.decision("z", torch.ones(2))
        c = torch.zeros(2, dtype=torch.complex64)
        torch.view_as_real(c)[..., 0] = z
        assert t.dependencies(c.abs()) == {"z"}


def test_what_is_carried_is_what_torch_has_brought_there():
    with Tracking() as t:
        z = t.decision("z", torch.ones(3))
        w = t.decision("w", torch.ones(3))
        assert t.carried(z * 2) == {"z"}
        with pytest.warns(EscapeWarning):
            w[0].item()
        assert t.carried([z.sum(), 1.0]) == {"z"}
        assert t.carried(torch.ones(2)) == frozenset()
        assert t.dependencies(torch.ones(2)) == {"w"}
    with pytest.raises(sf.ScorefnError, match="is not open"):
        t.carried(z)
    with Tracking(dependencies="order") as t:
        t.decision("z", torch.ones(3))
        assert t.carried(torch.ones(2)) == {"z"}


def test_an_escape_is_told_once_for_a_line_of_a_loop():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            with Tracking() as t:
                t.decision("z", torch.ones(())).item()
    assert len(caught) == 1
