"""What the public objects of tracking, graphs and posteriors show of themselves: how they were made, what they hold."""

import pyro
import pyro.distributions as dist
import pytest
import torch

import scorefn as sf
from scorefn import posteriors, tracking
from scorefn.posteriors import (
    VIMCO,
    ArithmeticMean,
    BoundOnly,
    DoublyReparameterized,
    IterateAverage,
    ScoreFunctionELBO,
)


def reproduced(text):
    names = {**vars(sf), **{name: getattr(posteriors, name) for name in posteriors.__all__}}
    return eval(text, names)


@pytest.mark.parametrize(
    "text",
    [
        "ScoreFunctionELBO(num_particles=16)",
        "ScoreFunctionELBO(num_particles=16, dependencies='tracked', audit_every=50)",
        "ScoreFunctionELBO(num_particles=1, baseline=None, credit=Total())",
        "ScoreFunctionELBO(num_particles=4, vectorize_particles=False, max_plate_nesting=2, retain_graph=True)",
        "VIMCO(num_particles=8)",
        "VIMCO(num_particles=8, baseline=BoundOnly(baseline=ArithmeticMean()), pathwise=None, plates=('data',))",
        "GeometricMean()",
        "DoublyReparameterized()",
    ],
)
def test_what_was_called_is_shown_without_defaults(text):
    assert repr(reproduced(text)) == text


def test_a_default_that_is_written_out_is_none():
    loss = VIMCO(2, pathwise=DoublyReparameterized(), plates="auto")
    assert repr(loss) == "VIMCO(num_particles=2)"
    assert repr(ScoreFunctionELBO(dependencies="order", estimators={})) == "ScoreFunctionELBO(num_particles=1)"
    assert repr(BoundOnly(ArithmeticMean())) == "BoundOnly(baseline=ArithmeticMean())"


def test_a_loss_of_ones_own_is_shown():
    class Mine(ScoreFunctionELBO):
        def __init__(self, temperature):
            super().__init__(2)

    class Named(VIMCO):
        pass

    assert repr(Mine(3.0)) == "Mine()"
    assert repr(Named(4)) == "Named(num_particles=4)"


def test_an_average_shows_its_limits_and_its_count():
    assert repr(IterateAverage()) == "IterateAverage(0 iterates, converged=False)"
    average = IterateAverage(min_window=16, max_mcse=0.05, min_ess=10.0, scale=lambda average: {})
    average.update({"x": torch.zeros(2)})
    assert repr(average) == (
        "IterateAverage(min_window=16, max_mcse=0.05, min_ess=10.0, scale=..., 1 iterates, converged=False)"
    )


def test_a_graph_shows_how_it_was_made_and_what_its_last_run_had():
    g = sf.StochasticGraph(8)
    assert repr(g) == "StochasticGraph(num_samples=8, sites=0, costs=0)"
    with g:
        z = g.sample("z", torch.distributions.Bernoulli(torch.full((3,), 0.5)))
        w = g.sample("w", torch.distributions.Bernoulli(torch.full((3,), 0.5)))
        g.cost("sum", (z + w).sum(-1))
    assert repr(g) == "StochasticGraph(num_samples=8, sites=2, costs=1)"
    g = sf.StochasticGraph(2, baseline=None, dependencies={"sum": ["z"]}, audit_every=100)
    assert repr(g) == (
        "StochasticGraph(num_samples=2, baseline=None, dependencies={'sum': ['z']}, audit_every=100, sites=0, costs=0)"
    )


def test_a_tracking_shows_what_it_has_seen():
    with tracking.Tracking({"z": torch.tensor(1.0)}, dependencies="order") as t:
        z = t.decision("z", torch.tensor(0.0))
        t.value("twice", 2 * z)
    assert repr(t) == "Tracking(pinned=['z'], dependencies='order', decisions=1, values=1, escapes=0)"
    with tracking.Tracking() as t, pytest.warns(tracking.EscapeWarning):
        t.decision("z", torch.tensor(1.0)).item()
    assert repr(t) == "Tracking(decisions=1, values=0, escapes=1)"
    assert repr(t.escapes[0]).startswith("Escape(decisions=('z',), kind='.item()', filename='")


def test_an_audit_shows_its_pairs():
    def program(ledger):
        z = ledger.decision("z", torch.bernoulli(torch.tensor(0.5)), given=())
        ledger.value("twice", 2 * z)

    supports = {"z": torch.tensor([0.0, 1.0])}
    report = tracking.audit(program, supports=supports, exhaustive=True, trials=1)
    assert repr(report) == (
        "AuditReport(decisions=1, values=1, trials=1, runs=4, exhaustive=True, moved=(('z', 'twice'),))"
    )
    report = tracking.audit(program, torch.tensor([[False]]), supports=supports, trials=2)
    assert repr(report).endswith("refuted=(('z', 'twice'),), unproven=())")


def test_no_public_object_shows_an_address():
    def model():
        z = pyro.sample("z", dist.Bernoulli(0.3))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.7))

    def guide():
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("logit", torch.tensor(-0.6))))

    pyro.clear_param_store()
    loss = ScoreFunctionELBO(2, dependencies="tracked", estimators={"z": sf.DisARM()})
    report = posteriors.diagnose(ScoreFunctionELBO(2), model, guide, num_draws=50, repeats=2)
    draws = ScoreFunctionELBO(2).draws(model, guide)
    shown = [loss, report, report.bound, report.psis, report.evidence, report.total, report.allocation, draws.credit]
    for thing in shown:
        assert " at 0x" not in repr(thing), type(thing).__name__
        assert " object" not in repr(thing), type(thing).__name__
    assert repr(report) == str(report)
    assert repr(report).splitlines()[0].startswith("ELBO")
