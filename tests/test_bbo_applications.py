"""The programs of black-box search: exact optima, accounts and what they write; short runs only."""

import json
import math
import sys

import numpy as np
import pytest
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

import scorefn as sf
from applications.bbo import any_distribution, bit_optimisers, combinatorial, landscapes, tune
from applications.bbo.any_distribution import Family, anneal, bernoulli, bernoulli_mixture
from applications.bbo.bit_optimisers import Account
from applications.bbo.bit_problems import NK, Knapsack, LeadingOnes, MaxCut, OneMax, largest
from applications.bbo.landscapes import himmelblau_landscape, twomax_landscape
from applications.bbo.tune import KINDS, Objective, Settings, Trials
from scorefn.diagnostics import exact_gradient

# ------------------------------------------------------------------------------------------------------ combinatorial


@pytest.mark.parametrize(
    "problem",
    [
        OneMax(9),
        LeadingOnes(9),
        MaxCut.random(12, 0),
        MaxCut.random(14, 1, degree=4),
        MaxCut(np.triu(np.arange(64.0).reshape(8, 8) - 30, 1) + np.triu(np.arange(64.0).reshape(8, 8) - 30, 1).T),
        MaxCut(np.kron(np.eye(3), 1 - np.eye(3))),  # three triangles apart
        Knapsack.random(13, 0),
        Knapsack(np.array([9, 3, 4, 20]), np.array([5.0, 3.0, 3.0, 100.0]), 12),
        NK.random(13, 3, 0, adjacent=True),
        NK.random(11, 0, 1, adjacent=True),
        NK.random(6, 5, 1, adjacent=True),
        NK.random(16, 4, 2, adjacent=False),
    ],
    ids=lambda problem: f"{problem.name}-{problem.dimension}",
)
def test_the_exact_optimum_is_the_largest_value_of_all_strings(problem):
    assert problem.optimum() == pytest.approx(largest(problem), rel=1e-12)


def test_values_are_what_their_formulas_say():
    x = np.array([[1, 1, 0, 1], [0, 1, 1, 1], [1, 1, 1, 1]], dtype=np.int8)
    assert OneMax(4)(x).tolist() == [3, 3, 4]
    assert LeadingOnes(4)(x).tolist() == [2, 0, 4]
    path = np.diag([1.0, 2.0, 4.0], 1)
    assert MaxCut(path + path.T)(x).tolist() == [6, 1, 0]
    assert Knapsack(np.array([5, 5, 5, 5]), np.array([1.0, 2.0, 3.0, 4.0]), 15)(x).tolist() == [7, 9, -5]
    problem = NK.random(7, 2, 3, adjacent=False)
    y = np.random.default_rng(0).integers(0, 2, (5, 7))
    by_hand = [
        sum(problem.table[i, int("".join(str(row[j]) for j in problem.neighbours[i]), 2)] for i in range(7)) / 7
        for row in y
    ]
    assert problem(y).tolist() == pytest.approx(by_hand, rel=1e-14)


def test_large_instances_have_an_exact_optimum_that_local_search_does_not_exceed():
    for problem in combinatorial.instances(40, 0):
        account = Account(problem, problem.optimum(), 500)
        bit_optimisers.local_search(account, problem.dimension, 0)
        assert account.best <= problem.optimum() + 1e-9
    graph = MaxCut.random(40, 0)
    assert (graph.weights.sum(1) == 3).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MaxCut(np.ones((3, 3))), "diagonal of zeros"),
        (lambda: MaxCut(np.zeros((2, 3))), "symmetric square table"),
        (lambda: MaxCut.random(7, 0), "no graph of 7 nodes of degree 3"),
        (lambda: MaxCut(1 - np.eye(30)).optimum(), "more than 24"),
        (lambda: Knapsack(np.array([1.5]), np.array([1.0]), 3), "whole numbers"),
        (lambda: NK(np.zeros((3, 2), dtype=int), np.zeros((3, 2))), r"need a table of \(3, 4\)"),
        (lambda: NK.random(5, 5, 0, adjacent=True), "k must be 0 to 4"),
        (lambda: NK.random(30, 2, 0, adjacent=False).optimum(), "too many to look at"),
    ],
)
def test_problems_that_are_none_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_an_account_pays_for_its_budget_and_ends_at_the_optimum():
    account = Account(OneMax(3), 3.0, 5)
    x = np.array([[0, 0, 0], [0, 0, 1], [0, 0, 1]], dtype=np.int8)
    assert account(x).tolist() == [0, 1, 1]
    assert account.better == [(1, 0.0), (2, 1.0)]
    assert np.isnan(account(x)).tolist() == [False, False, True]
    assert (account.spent, account.left, account.hit) == (5, 0, False)
    account = Account(OneMax(3), 3.0, 5)
    account(np.ones((2, 3), dtype=np.int8))
    assert (account.hit, account.left) == (True, 0)


@pytest.mark.parametrize("name", combinatorial.OPTIMISERS)
def test_every_optimiser_keeps_to_the_budget_and_to_its_seed(name):
    first, again = (combinatorial.attempt("f", LeadingOnes(30), 30, 31.0, name, 4, 333) for _ in range(2))
    assert first.evaluations == 333
    assert first.better == again.better
    hit = combinatorial.attempt("f", OneMax(6), 6, 6.0, name, 0, 5000)
    assert hit.hit
    assert hit.gap == 0
    assert hit.evaluations < 5000


def test_the_gap_follows_the_improvements():
    run = combinatorial.Run("f", "local", 0, 10.0, 5.0, 8, False, [(1, -5.0), (3, 5.0)], 0.0)
    assert combinatorial.gaps(run, np.array([1, 2, 3, 8])).tolist() == [1, 1, 0.5, 0.5]
    assert run.gap == 0.5


def test_combinatorial_writes_its_result(tmp_path, capsys, monkeypatch):
    options = ["--size", "8", "--seeds", "2", "--budget", "100", "--out", str(tmp_path)]
    assert combinatorial.main([*options, "--optimisers", "scorefn", "random"]) == 0
    record = json.loads((tmp_path / "result.json").read_text())
    assert record["complete"]
    assert len(record["runs"]) == 24
    assert {row["runs"] for row in record["table"]} == {2}
    assert (tmp_path / "combinatorial.png").stat().st_size > 0
    monkeypatch.setitem(sys.modules, "ioh", None)
    with pytest.raises(SystemExit):
        combinatorial.main([*options, "--pbo"])
    assert "pip install ioh" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        combinatorial.main(["--size", "7"])
    assert "no graph of 7 nodes" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------------- tune


def test_settings_map_every_part():
    settings = Settings.of([-1.0, 0.5], [7.0, 2.0, 9.0], [2, 1])
    assert settings == Settings(pytest.approx(0.1), 0.5, 70, 2, 9, "huber", "sqrt")
    for outside in (
        ([-3.0, 0.5], [7, 2, 9], [2, 1]),
        ([-1.0, 0.5], [13, 2, 9], [2, 1]),
        ([-1.0, 0.5], [7, 2, 9], [3, 1]),
    ):
        with pytest.raises(ValueError, match="lies outside"):
            Settings.of(*outside)


def test_trials_remember_but_count():
    asked = []

    def error(settings):
        asked.append(settings)
        return settings.learning_rate

    known = {}
    trials = Trials(error, known)
    small, large = Settings(learning_rate=0.1), Settings(learning_rate=0.2)
    assert [trials(large), trials(small), trials(large)] == [0.2, 0.1, 0.2]
    assert (trials.errors, trials.best, asked) == ([0.2, 0.1, 0.2], small, [large, small])
    Trials(error, known)(small)
    assert len(asked) == 2
    with pytest.raises(Trials.Stopped):
        Trials(error, known, lambda: True)(small)


def distance(settings: Settings) -> float:
    """To settings that are known; no model is trained."""
    far = abs(math.log10(settings.learning_rate) + 1) + abs(settings.subsample - 0.7)
    far += abs(settings.n_estimators - 60) / 120 + abs(settings.max_depth - 2) / 6
    return (
        far + abs(settings.min_samples_leaf - 20) / 40 + (settings.loss != "huber") + (settings.max_features != "sqrt")
    )


@pytest.mark.parametrize("name", tune.TUNERS)
def test_every_tuner_keeps_to_the_budget_and_to_its_seed(name):
    if name == "optuna":
        pytest.importorskip("optuna")
    found = []
    for _ in range(2):
        trials = Trials(distance, {})
        tune.TUNERS[name](trials, 41, 3)
        found.append(trials.errors)
    assert found[0] == found[1]
    assert len(found[0]) == 41


def test_product_search_finds_known_settings():
    trials = Trials(distance, {})
    tune.product_search(trials, 801, 0)
    assert (trials.best.loss, trials.best.max_features, trials.best.max_depth) == ("huber", "sqrt", 2)
    assert min(trials.errors) < 0.1


def test_an_objective_is_reproducible_and_splits_by_its_seed():
    settings = Settings(n_estimators=10)
    assert Objective(0)(settings) == Objective(0)(settings)
    assert Objective(0).held_out(settings) != Objective(1).held_out(settings)
    assert set(KINDS) <= set(vars(settings))


def test_tune_writes_its_result(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tune.Objective, "__call__", lambda self, settings: distance(settings))
    monkeypatch.setattr(tune, "find_spec", lambda name: None)
    options = ["--seeds", "2", "--evaluations", "20", "--out", str(tmp_path)]
    assert tune.main(options) == 0
    record = json.loads((tmp_path / "result.json").read_text())
    assert record["complete"]
    assert [row["tuner"] for row in record["table"]] == ["scorefn", "random"]
    assert [len(run["errors"]) for run in record["runs"]] == [17, 20, 17, 20]  # whole generations and the mean
    assert (tmp_path / "tune.png").stat().st_size > 0
    assert "left out" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        tune.main([*options, "--tuners", "optuna"])
    assert "pip install optuna" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------- any distribution


def test_the_optima_of_himmelblau_are_zeros_and_stationary():
    optima = himmelblau_landscape(step=0.5).optima.clone().requires_grad_()
    values = landscapes.himmelblau(optima)
    (gradient,) = torch.autograd.grad(values.sum(), optima)
    assert values.max() < 1e-25
    assert gradient.abs().max() < 1e-11
    known = [(3, 2), (-2.805118, 3.131312), (-3.779310, -3.283186), (3.584428, -1.848126)]
    assert torch.allclose(optima, torch.tensor(known, dtype=torch.float64), atol=1e-6)


def test_the_rules_integrate_what_is_known():
    """A Gaussian's entropy; the Boltzmann distribution's free energy; that no other one is lower."""
    landscape = himmelblau_landscape(step=0.05)
    p = Family("p", lambda s: Independent(Normal(torch.zeros(2), s.exp()), 1), torch.zeros(2))()
    # f = a^4 + b^4 + 2 a^2 b + 2 a b^2 - 21 a^2 - 13 b^2 - 14 a - 22 b + 170, and E a^2 = 1, E a^4 = 3
    mean = 2 * 3 - 21 - 13 + 170
    entropy = 1 + math.log(2 * math.pi)
    assert landscape.free_energy(p, 3.0) == pytest.approx(mean - 3.0 * entropy, rel=1e-9)
    bits = twomax_landscape(6)
    z = sum(math.comb(6, k) * math.exp(max(k, 6 - k) / 0.5) for k in range(7))
    assert bits.least(0.5) == pytest.approx(-0.5 * math.log(z), rel=1e-12)
    best = Categorical(logits=-bits.f(bits.points) / 0.5)

    class Table:
        def log_prob(self, x):
            return best.logits

    assert bits.free_energy(Table(), 0.5) == pytest.approx(bits.least(0.5), rel=1e-12)
    assert bits.free_energy(bernoulli(0, 6)(), 0.5) > bits.least(0.5)
    mass = [math.comb(6, k) * math.exp(max(k, 6 - k) / bits.cold) for k in range(7)]
    less = sum(mass[:3]) / sum(mass)  # three bits of six are as near to both optima, and counted with the first
    assert bits.boltzmann_shares().tolist() == pytest.approx([1 - less, less], rel=1e-12)


def test_what_the_search_is_told_has_the_gradient_of_the_free_energy():
    """E (f + T log p) grad log p, with the factor detached, is the gradient of F: by enumeration."""
    landscape, family = twomax_landscape(4), bernoulli_mixture(0, 4, 2)
    p = family()
    log_p = p.log_prob(landscape.points)
    free = (log_p.exp() * (landscape.f(landscape.points) + 0.7 * log_p)).sum()
    wanted = torch.autograd.grad(free, family.parameters)
    p = family()
    log_p = p.log_prob(landscape.points)
    told = landscape.f(landscape.points) + 0.7 * log_p.detach()
    got = torch.autograd.grad((log_p.detach().exp() * told * log_p).sum(), family.parameters)
    for one, other in zip(got, wanted, strict=True):
        assert torch.allclose(one, other, atol=1e-12)
    own = bernoulli(1, 3)
    exact = exact_gradient(own(), lambda x: landscapes.twomax(x), own.parameters)
    strings = twomax_landscape(3).points
    expected = (own().log_prob(strings).exp() * landscapes.twomax(strings)).sum()
    (by_hand,) = torch.autograd.grad(expected, own.parameters)
    assert torch.allclose(exact[0], by_hand, atol=1e-12)


def test_a_mixture_keeps_both_optima_where_independent_bits_keep_one():
    landscape = twomax_landscape(8)
    one, both = (anneal(landscape, make(0, 8), 0, 150) for make in (bernoulli, bernoulli_mixture))
    assert (one.kept, both.kept) == (1, 2)
    assert one.gap > 0.5 * math.log(2) * 0.9 > 5 * both.gap
    assert both.evaluations == 150 * any_distribution.POPSIZE
    assert min(both.gap, one.gap) >= 0


def test_an_annealing_ends_when_asked():
    found = anneal(twomax_landscape(4), bernoulli(0, 4), 0, 100, should_stop=lambda: True)
    assert found.evaluations == any_distribution.POPSIZE
    assert len(found.way) == 1


def test_a_beta_search_stays_inside_and_finds_the_corner():
    found = any_distribution.corner(0)
    assert found["inside"]
    assert found["stop"] == ["ftarget"]
    assert found["evaluations"] < 2000


def test_any_distribution_writes_its_result(tmp_path, monkeypatch):
    small = [
        (lambda: himmelblau_landscape(step=0.25), any_distribution.PROBLEMS[0][1]),
        (twomax_landscape, any_distribution.PROBLEMS[1][1]),
    ]
    monkeypatch.setattr(any_distribution, "PROBLEMS", small)
    options = ["--seeds", "1", "--generations", "8", "--popsize", "6", "--out", str(tmp_path)]
    assert any_distribution.main(options) == 0
    record = json.loads((tmp_path / "result.json").read_text())
    assert record["complete"]
    assert [len(row["kept"]) for row in record["table"]] == [1, 1, 1, 1]
    assert (tmp_path / "any_distribution.png").stat().st_size > 0


def test_the_search_takes_a_mixture_as_it_stands():
    """No sampling path is needed: MixtureSameFamily has none."""
    logits, locs = torch.zeros(2, requires_grad=True), torch.tensor([-1.0, 1.0], requires_grad=True)
    strategy = sf.search.DistributionSearch(
        lambda: MixtureSameFamily(Categorical(logits=logits), Independent(Normal(locs.unsqueeze(1), 1.0), 1)),
        [logits, locs],
        popsize=6,
        seed=0,
    )
    assert not strategy.distribution.has_rsample
    x = strategy.ask()
    strategy.tell(x, x.square().sum(1))
    assert strategy.result.evaluations == 6
