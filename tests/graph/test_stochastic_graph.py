"""The graph as its users meet it: shapes, baselines, what is kept between runs, and what is refused."""

import subprocess
import sys
import warnings

import pytest
import torch
from torch.distributions import Bernoulli, Categorical, Independent, Normal, Uniform

import scorefn as sf
from scorefn.graph.credit import GraphCredit, SiteBaselines
from scorefn.tracking import EscapeWarning


def logits(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def two_sites(g, a, b, **site):
    z = g.sample("z", Bernoulli(logits=a), **site)
    h = g.sample("h", Bernoulli(logits=b * z))
    g.cost("first", z.sum(-1))
    g.cost("second", (h - 0.3).square().sum(-1))


# ------------------------------------------------------------------------------------------------------------ shapes


def test_draws_are_those_of_the_core():
    a, b = logits(5), logits(5, seed=1)
    with sf.StochasticGraph(7) as g:
        two_sites(g, a, b)
    draws = g.draws()
    assert draws.log_prob.shape == (7, 2)
    assert draws.fx.shape == (7, 2)
    assert draws.x["z"].shape == (7, 5)
    assert draws.credit.mask.tolist() == [[1, 1], [0, 1]]
    for ours, core in ((g.surrogate(), sf.surrogate), (g.dice(), sf.dice)):
        gradient = torch.autograd.grad(ours.mean(), (a, b), retain_graph=True)
        other = torch.autograd.grad(core(draws, baseline=sf.LeaveOneOut()).mean(), (a, b), retain_graph=True)
        for mine, its in zip(gradient, other, strict=True):
            torch.testing.assert_close(mine, its, rtol=0, atol=0)


def test_the_credit_is_the_dense_influence():
    mask = torch.tensor([[1.0, 1, 0, 1], [0, 1, 0, 1], [0, 1, 0, 1]])
    ours, dense = GraphCredit(mask), sf.Influence(mask.bool())
    v, u = torch.randn(6, 2, 4), torch.randn(6, 2, 3)
    torch.testing.assert_close(ours.influence(v), dense.influence(v))
    torch.testing.assert_close(ours.influence_adjoint(u), dense.influence_adjoint(u))
    torch.testing.assert_close(ours.predecessors(u), dense.predecessors(u))
    with pytest.raises(sf.ShapeError, match="belongs to the draws"):
        ours.check(2, 4)


def test_a_site_that_knows_all_costs_has_total_credit():
    with sf.StochasticGraph(3) as g:
        z = g.sample("z", Bernoulli(logits=logits(2)))
        g.cost("c", z.sum(-1))
        g.cost("d", z.prod(-1))
    assert type(g.draws().credit) is sf.Total


def test_nested_draws_and_their_siblings():
    with sf.StochasticGraph(3) as g:
        z = g.sample("z", Bernoulli(logits=logits(5, 2)))
        h = g.sample("h", Bernoulli(logits=z + logits(5, 2, seed=1)), num_samples=4)
        k = g.sample("k", Bernoulli(logits=h - logits(5, 2, seed=2)), num_samples=2)
        assert [part.shape for part in (z, h, k)] == [(3, 5, 2), (3, 4, 5, 2), (3, 4, 2, 5, 2)]
        assert g.log_prob("k").shape == (3, 4, 2, 5, 2)
        g.cost("c", k.sum(-1))
    draws = g.draws()
    assert draws.log_prob.shape == (3, 5, 1 + 4 + 8)
    assert draws.fx.shape == (3, 5, 8)
    torch.testing.assert_close(g.surrogate(), k.sum(-1).mean((1, 2)))
    # h[m] is compared with the other h of the same z, k[m, l] with the other k of the same h
    signal = draws.signal()
    baseline = g._assembled().baseline(signal, draws)
    of_h, of_k = signal[..., 1:5], signal[..., 5:].unflatten(-1, (4, 2))
    torch.testing.assert_close(baseline[..., 0], sf.LeaveOneOut()(signal, draws)[..., 0])
    torch.testing.assert_close(baseline[..., 1:5], (of_h.sum(-1, keepdim=True) - of_h) / 3)
    torch.testing.assert_close(baseline[..., 5:], of_k.flip(-1).flatten(-2))


def test_only_pathwise_sites():
    loc = logits(2)
    with sf.StochasticGraph(4) as g:
        g.cost("c", g.sample("x", Normal(loc, 1.0), pathwise=True).sum(-1))
    for value in (g.surrogate(), g.dice()):
        assert torch.autograd.grad(value.mean(), loc, retain_graph=True)[0].tolist() == [1, 1]
    assert g.expectation().shape == ()
    with pytest.raises(sf.ScorefnError, match="No site of this graph is scored"):
        g.draws()


def test_value_alone_without_grad():
    with torch.no_grad(), sf.StochasticGraph(4) as g:
        two_sites(g, logits(3), logits(3, seed=1))
    with torch.no_grad():
        assert g.surrogate().shape == (4,)


def test_the_estimate_may_be_read_inside_the_block_without_an_escape():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with sf.StochasticGraph(4) as g:
            two_sites(g, logits(3), logits(3, seed=1), baseline=sf.Constant(1.0))
            g.surrogate().mean().backward()
            with pytest.raises(sf.ScorefnError, match="its estimate was read"):
                g.cost("late", torch.zeros(4))


def test_reduced_integers_are_costs():
    a = logits(3)
    with sf.StochasticGraph(4) as g:
        z = g.sample("z", Categorical(logits=a))
        g.cost("is 2", z == 2)
        g.cost("level", z)
    torch.testing.assert_close(g.surrogate(), (z + (z == 2)).to(a.dtype))


# --------------------------------------------------------------------------------------------------------- baselines


def test_baselines_learn_in_expectation_only():
    average, shared = sf.MovingAverage(), sf.MovingAverage()
    a, b = logits(3), logits(3, seed=1)
    g = sf.StochasticGraph(4, baseline=shared)
    with g:
        z = g.sample("z", Bernoulli(logits=a), baseline=average)
        h = g.sample("h", Bernoulli(logits=b * z))
        k = g.sample("k", Bernoulli(logits=b * h))
        g.cost("c", z.sum(-1))
        g.cost("d", (h + k).sum(-1))
    g.surrogate()
    g.dice()
    assert average.mean is None
    assert g.expectation().shape == ()
    signal = g.draws().signal()
    torch.testing.assert_close(average.mean / average.weight, signal.mean(0)[:1])
    torch.testing.assert_close(shared.mean / shared.weight, signal.mean(0)[1:])
    before = shared.mean
    with torch.no_grad():
        g.expectation()
    assert shared.mean is before


def test_one_baseline_for_all_is_used_as_it_is():
    own = sf.MovingAverage()
    with sf.StochasticGraph(4, baseline=own) as g:
        two_sites(g, logits(3), logits(3, seed=1))
    assert g._assembled().baseline is own
    with sf.StochasticGraph(4, baseline=own) as g:
        two_sites(g, logits(3), logits(3, seed=1), baseline=None)
    assert isinstance(g._assembled().baseline, SiteBaselines)
    assert g._assembled().baseline.unbiased


def test_a_value_function_of_a_site_sees_its_own_decisions_only():
    seen = []

    class Spy:
        unbiased = True

        def __call__(self, signal, draws):
            seen.append((signal.shape, draws.log_prob.shape, draws.credit.mask.tolist()))
            return torch.zeros_like(signal)

    with sf.StochasticGraph(4) as g:
        z = g.sample("z", Bernoulli(logits=logits(3)))
        g.cost("c", z.sum(-1))
        g.cost("d", g.sample("h", Bernoulli(logits=z), baseline=Spy()).sum(-1) + logits(1)[0])
        g.cost("e", g.sample("w", Bernoulli(logits=logits(3)), baseline=Spy()).sum(-1))
    g.surrogate()
    assert seen == [((4, 1), (4, 1), [[0, 0, 1]])]  # h has no parameter that requires grad


# ------------------------------------------------------------------------------------------- what is kept between runs


def counting(monkeypatch):
    from scorefn.graph import dependencies

    entered, plain = [], dependencies.Tracked.open
    monkeypatch.setattr(dependencies.Tracked, "open", lambda self: (entered.append(1), plain(self))[1])
    return entered


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


# ----------------------------------------------------------------------------------------------------------- refusals

COIN = Bernoulli(logits=torch.zeros(3, requires_grad=True))


def program(body, N=4, **kwargs):
    with sf.StochasticGraph(N, **kwargs) as g:
        body(g)
    return g.surrogate()


def z_and(rest, dist=COIN, **site):
    def body(g):
        rest(g, g.sample("z", dist, **site))

    return body


REFUSALS = {
    "taken by a site": z_and(lambda g, z: g.sample("z", COIN)),
    "taken by a cost": z_and(lambda g, z: (g.cost("c", z.sum(-1)), g.cost("c", z.sum(-1)))),
    "and no cost": z_and(lambda g, z: None),
    "depends on no site": z_and(lambda g, z: g.cost("c", torch.zeros(4))),
    r"known by its name, a string, but 3": lambda g: g.sample(3, COIN),
    r"shape \(4, 3\) after \[4\]\), but the cost 'c' has \(\)": z_and(
        lambda g, z: (g.cost("c", z.sum(-1)), g.cost("d", z))
    ),
    r"shape \(\), but it must be \[4\]": z_and(lambda g, z: g.cost("c", z.sum())),
    r"has batch shape \(\), but the costs, such as 'c', have \(3,\)": z_and(
        lambda g, z: g.cost("c", z.unsqueeze(-1).expand(4, 3)), Bernoulli(logits=torch.zeros((), requires_grad=True))
    ),
    r"begins with \(4,\). But its batch shape is \(3,\)": z_and(lambda g, z: g.sample("h", Bernoulli(logits=z.sum(0)))),
    "is a list, but it must be a tensor": z_and(lambda g, z: g.cost("c", [z.sum(-1)])),
    r"is complex \(torch.complex64\)": z_and(lambda g, z: g.cost("c", z.sum(-1) * 1j)),
    "no rsample": lambda g: g.sample("z", COIN, pathwise=True),
    "is not a measure": lambda g: g.sample("z", torch.zeros(3)),
    "num_samples of site 'z' must be an integer": lambda g: g.sample("z", COIN, num_samples=0),
    "is no estimator": lambda g: g.sample("z", COIN, estimator="DisARM"),
    "Enumerate is a class": lambda g: g.sample("z", COIN, estimator=sf.Enumerate),
    "has num_samples=2 and the estimator DisARM": lambda g: g.sample("z", COIN, estimator=sf.DisARM(), num_samples=2),
    "drawn by an estimator": lambda g: g.sample("z", COIN, estimator=sf.DisARM(), baseline=sf.Constant(0.0)),
    "is pathwise and has no score": lambda g: g.sample(
        "z", Normal(torch.zeros(3), 1.0), pathwise=True, baseline=sf.Constant(0.0)
    ),
    r"'h' has the estimator Enumerate and depends on site 'z', whose draws are coupled by DisARM": z_and(
        lambda g, z: g.sample("h", Bernoulli(logits=z), estimator=sf.Enumerate()), estimator=sf.DisARM()
    ),
    r"must begin with \(4, 2\). Keep that axis": z_and(
        lambda g, z: g.cost("c", z.sum((1, 2)), given=()), estimator=sf.DisARM()
    ),
    "draws more than values": lambda g: g.sample("z", COIN, estimator=sf.REBAR()),
    "given 'k', but there is no site": z_and(lambda g, z: g.sample("h", COIN, given="k")),
    'baseline of site .z. must be a baseline object, None or "auto"': lambda g: g.sample("z", COIN, baseline="loo"),
    "changed in place after they were sampled": z_and(lambda g, z: g.cost("c", z.zero_().sum(-1))),
    "'k' and 'h', whose draws lie along axes of their own beside each other": z_and(
        lambda g, z: g.cost(
            "c",
            g.sample("h", COIN, num_samples=2).sum((1, 2)) * g.sample("k", COIN, num_samples=3).sum((1, 2)) * z.sum(-1),
        )
    ),
    "a cost .c. was changed|The cost 'c' was changed in place": z_and(
        lambda g, z: (g.cost("c", c := z.sum(-1)), c.add_(1.0))
    ),
    r"Neither a cost nor the log-probability of a site \(z\) requires grad": z_and(
        lambda g, z: g.cost("c", z.sum(-1)), Bernoulli(logits=torch.zeros(3))
    ),
    "The support of Uniform moves": lambda g: g.sample("z", Uniform(torch.zeros((), requires_grad=True), 1.0)),
    "There is no site 'q'": lambda g: g.log_prob("q"),
    "f is nan at 4 of 4 draws": z_and(lambda g, z: g.cost("c", z.sum(-1) * torch.nan)),
    "NaN or infinite at one of its coupled draws": z_and(
        lambda g, z: g.cost("c", z.sum(-1) * torch.nan), Independent(COIN, 1), estimator=sf.DisARM()
    ),
    "A cost of this graph is NaN": z_and(
        lambda g, z: g.cost("c", z * torch.nan), Normal(torch.zeros((), requires_grad=True), 1.0), pathwise=True
    ),
}


@pytest.mark.parametrize("message", REFUSALS)
def test_refusals(message):
    with pytest.raises(sf.ScorefnError, match=message):
        program(REFUSALS[message])


def test_use_at_the_wrong_time():
    g = sf.StochasticGraph(4)
    with pytest.raises(sf.ScorefnError, match="it was not entered"):
        g.sample("z", COIN)
    with pytest.raises(sf.ScorefnError, match="it was never entered"):
        g.surrogate()
    with g:
        g.cost("c", g.sample("z", COIN).sum(-1))
        with pytest.raises(sf.ScorefnError, match="is entered while its block is open"):
            g.__enter__()
    g.surrogate()
    with pytest.raises(sf.ScorefnError, match="its block has ended"):
        g.cost("d", torch.zeros(4))
    with pytest.raises(RuntimeError), g:
        raise RuntimeError
    with pytest.raises(sf.ScorefnError, match="its block ended with an error"):
        g.surrogate()
    with g:  # afterwards it is as before
        g.cost("c", g.sample("z", COIN).sum(-1))
    assert g.surrogate().shape == (4,)


def test_dice_with_an_estimator_is_refused():
    with sf.StochasticGraph(3) as g:
        g.cost("c", g.sample("z", Independent(COIN, 1), estimator=sf.DisARM()).sum(-1))
    with pytest.raises(
        sf.ScorefnError, match="Site 'z' has the estimator DisARM, whose surrogate is right for the first"
    ):
        g.dice()


def test_leave_one_out_without_another_draw_is_refused():
    with pytest.raises(sf.ScorefnError, match="LeaveOneOut at site 'z' needs another draw"):
        program(z_and(lambda g, z: g.cost("c", z.sum(-1)), baseline=sf.LeaveOneOut()), N=1)


@pytest.mark.filterwarnings("ignore::scorefn.tracking.EscapeWarning")
def test_a_layout_that_python_chose_is_not_guessed():
    def body(given):
        def run(g):
            z = g.sample("z", Bernoulli(logits=logits(1)[0]))
            rows = [logits(1)[0] if each.item() else logits(1, seed=1)[0] for each in z]
            g.cost("c", g.sample("h", Bernoulli(logits=torch.stack(rows)), given=given) * 1.0)

        return run

    with pytest.raises(
        sf.ScorefnError, match="was chosen by Python after 'z' left .* cannot be told .* given='z' if so"
    ):
        program(body(None))
    assert program(body("z")).shape == (4,)


def test_a_hidden_parameter_is_told_by_the_draws():
    class Hidden:
        def __init__(self, p):
            self.sample, self.log_prob = p.sample, p.log_prob

    with pytest.raises(sf.ScorefnError, match="depend on site 'z', which does not show in the tensors of its Hidden"):
        program(z_and(lambda g, z: g.sample("h", Hidden(Bernoulli(logits=z)))))
    shape = program(
        z_and(lambda g, z: g.cost("c", g.sample("h", Hidden(Bernoulli(logits=z)), given="z").sum(-1)))
    ).shape
    assert shape == (4,)


def test_a_new_site_of_a_kept_program_has_to_tell_its_layout():
    g = sf.StochasticGraph(4, audit_every=1000)
    for _ in range(2):
        with g:
            g.cost("c", g.sample("z", COIN).sum(-1))
        g.surrogate()
    with pytest.raises(sf.ScorefnError, match="keeps the dependency map of its program, but 'h' was not there"), g:
        g.sample("h", COIN)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_samples": 0}, "num_samples must be an integer of at least 1"),
        ({"num_samples": 2, "audit_every": 0}, "audit_every must be"),
        ({"num_samples": 2, "baseline": "loo"}, "baseline must be a baseline object"),
        ({"num_samples": 2, "baseline": sf.LeaveOneOut}, "LeaveOneOut is a class"),
        ({"num_samples": 2, "dependencies": {"h": "z"}}, "dependencies must map"),
        ({"num_samples": 2, "dependencies": "order"}, "dependencies must map"),
    ],
)
def test_arguments(kwargs, message):
    with pytest.raises(sf.ScorefnError, match=message):
        sf.StochasticGraph(**kwargs)


def test_the_import_is_lazy():
    code = "import sys, scorefn; assert 'scorefn.graph' not in sys.modules; scorefn.StochasticGraph(2)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("options", [{"num_samples": 4}, {"estimator": sf.DisARM(2)}], ids=str)
def test_as_many_draws_as_the_axis_before_are_refused(options):
    with sf.StochasticGraph(4) as g:
        g.sample("z", Bernoulli(logits=logits(3)))
        with pytest.raises(sf.ShapeError, match="Site 'h' has 4 draws of its own for each of 4 draws"):
            g.sample("h", Bernoulli(logits=logits(3, seed=1)), **options)


@pytest.mark.parametrize("estimator", [sf.Enumerate(), sf.LocalExpectation(), sf.SumAndSample(2), sf.UnorderedSet(2)])
def test_the_draws_of_parents_are_problems_of_an_estimator(estimator):
    a, b = logits(2), logits(2, seed=1)
    with sf.StochasticGraph(32) as g:
        z = g.sample("z", Bernoulli(logits=a))
        y = g.sample("y", Bernoulli(logits=z * b), estimator=estimator)
        g.cost("c", (y - 0.3).square().sum(-1).square())
    assert y.shape[0] == g.surrogate().shape[0] == 32
    if isinstance(estimator, sf.Enumerate):
        assert y.shape == (32, 4, 2)
        p = Bernoulli(logits=(z * b).detach().requires_grad_())
        inner = sf.Enumerate(batch_ndim=1)(p, lambda y: (y - 0.3).square().sum(-1).square())
        torch.testing.assert_close(g.surrogate(), inner)
