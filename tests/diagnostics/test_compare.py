"""The comparison: prices against exact variances, intervals that cover, marks that cannot be missed."""

import io
import itertools
import math
import sys
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from torch.distributions import Bernoulli

import scorefn as sf
from scorefn.diagnostics import compare, evaluations, seconds
from scorefn.diagnostics.equivalence import critical_z, equivalence
from scorefn.diagnostics.prices import Measurement, effective_repeats, prices_of, resampled_medians, within


def measured(gradients, timings=(1.0,), count=2):
    parameter = torch.zeros(gradients.shape[1], dtype=torch.float64, requires_grad=True)
    return Measurement.of(gradients, list(timings), count, (parameter,))


def noise(repeats, deviation, seed=0, shift=0.0, size=3):
    generator = torch.Generator().manual_seed(seed)
    return shift + deviation * torch.randn(repeats, size, generator=generator, dtype=torch.float64)


def fixed(rows, parameter):
    """An estimate whose gradients are the rows, in turn."""
    at = iter(rows)
    return lambda: (next(at) * parameter).sum()


@pytest.fixture
def parameter():
    return torch.zeros(3, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize(
    ("probability", "leave_one_out", "disarm"), [(0.5, 0.0625, 0.0), (0.3, 0.0609, 0.0294), (0.1, 0.0369, 0.0324)]
)
def test_prices_of_the_coin_are_the_exact_variances(probability, leave_one_out, disarm):
    logit = torch.tensor([probability], dtype=torch.float64).logit().requires_grad_()
    p, f = Bernoulli(logits=logit), lambda x: x.sum(-1)
    estimates = {"loo": (p, f, partial(sf.expectation, num_samples=2)), "disarm": (p, f, sf.DisARM())}
    found = compare(estimates, logit, repeats=1000, cost=evaluations, confidence=1 - 1e-3)
    for name, variance in (("loo", leave_one_out), ("disarm", disarm)):
        low, high = found.intervals[name]
        assert low <= 2 * variance + 1e-12
        assert 2 * variance <= high + 1e-12
        assert found.statistics[name].evaluations == 2
    assert found.names[0] == "disarm" or probability == 0.1
    assert found.cost_name == "evaluations"


@pytest.mark.parametrize("n", range(1, 7))
def test_resampled_medians_have_the_law_of_all_resamples(n):
    """All n^n of them, within 5 standard deviations of a count."""
    values, generator = np.array([3.0, 1.0, 7.0, 2.0, 20.0, 11.0])[:n], np.random.default_rng(n)
    law = Counter(np.median(np.array(list(itertools.product(values, repeat=n))), axis=1).tolist())
    found = Counter(np.concatenate([resampled_medians(values, generator) for _ in range(20)]).tolist())
    assert set(found) <= set(law)
    total = found.total()
    for median, count in law.items():
        share = count / n**n
        assert abs(found[median] - total * share) <= 5 * (total * share * (1 - share)) ** 0.5


def test_the_price_is_variance_times_cost():
    gradients = noise(30, 2.0)
    own = measured(gradients, [1.0, 5.0, 2.0])
    for cost, factor in ((seconds, 2.0), (evaluations, 2.0), (lambda s: s.seconds + s.evaluations, 4.0)):
        prices, samples = prices_of({"a": own}, cost)
        assert prices["a"] == pytest.approx(factor * gradients.numpy().var(0, ddof=1).sum(), rel=1e-12)
        assert samples["a"].shape == (2000,)


@pytest.mark.parametrize(
    ("name", "sample", "truth"),
    [
        ("normal", lambda seed: noise(100, 1.0, seed), 3.0),
        ("skewed", lambda seed: (noise(200, 1.0, seed, size=1) > 1.0).double(), 0.15865525 * 0.84134475),
    ],
)
def test_intervals_cover(name, sample, truth):
    """Of 200 simulations as many as the binomial law of .95 allows at 1e-4, computed exactly."""
    runs, covered = 200, 0
    for seed in range(runs):
        low, high = np.quantile(prices_of({"a": measured(sample(seed), count=1)}, evaluations)[1]["a"], [0.025, 0.975])
        covered += low <= truth <= high
    log_law = [
        math.lgamma(runs + 1)
        - math.lgamma(k + 1)
        - math.lgamma(runs - k + 1)
        + k * math.log(0.95)
        + (runs - k) * math.log(0.05)
        for k in range(runs + 1)
    ]
    law = np.exp(log_law)
    least = int(np.searchsorted(law.cumsum(), 5e-5))
    most = runs - int(np.searchsorted(law[::-1].cumsum(), 5e-5))
    assert least <= covered <= most, covered


def test_seconds_are_resampled_too():
    steady = prices_of({"a": measured(noise(400, 1.0), [1.0] * 9)}, seconds)[1]["a"]
    rough = prices_of({"a": measured(noise(400, 1.0), [0.5, 0.6, 0.7, 0.9, 1.0, 1.2, 1.5, 1.9, 2.5])}, seconds)[1]["a"]
    assert np.log(rough).std() > 2 * np.log(steady).std()


def test_the_share_of_resamples_within_ten_per_cent():
    samples = {"a": np.array([1.0, 1.0, 2.0, 3.0]), "b": np.array([1.05, 2.0, 1.9, 1.0])}
    assert within(samples) == {"a": 0.75, "b": 0.75}


def test_how_many_repeats_a_variance_rests_on():
    rare = torch.zeros(1000, 1, dtype=torch.float64)
    rare[:2] = 1.0
    assert effective_repeats(measured(rare).statistics) < 2.1
    assert effective_repeats(measured(torch.tensor([[1.0], [-1.0]]).double().repeat(50, 1)).statistics) == 100
    assert effective_repeats(measured(torch.ones(9, 1).double()).statistics) == 0


def test_rounding_is_no_noise():
    exact = torch.ones(50, 3, dtype=torch.float64)
    exact[::2] += 1e-16 * torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    exact[1] += 3e-16
    prices, _ = prices_of({"exact": measured(exact), "noisy": measured(noise(50, 1.0))}, evaluations)
    assert prices["exact"] == 0.0 < prices["noisy"]


def test_few_repeats_claim_nothing(parameter):
    found = compare({"a": fixed(noise(5, 1.0), parameter)}, parameter, repeats=5)
    assert found.intervals["a"] == (0.0, math.inf)


def test_the_bootstrap_has_a_generator_of_its_own(parameter):
    before = torch.get_rng_state()
    state = np.random.get_state()[1].copy()
    runs = [
        compare({"a": fixed(noise(50, 1.0), parameter)}, parameter, repeats=50, cost=lambda s: 1.0) for _ in range(2)
    ]
    assert runs[0].intervals == runs[1].intervals
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == state).all()


def test_a_biased_estimate_is_ranked_last_and_marked(parameter):
    exact = torch.zeros(3, dtype=torch.float64)
    estimates = {
        "quiet but wrong": fixed(noise(100, 0.01, shift=0.1), parameter),
        "noisy": fixed(noise(100, 3.0, 1), parameter),
        "right": fixed(noise(100, 1.0, 2), parameter),
    }
    found = compare(estimates, parameter, exact, repeats=100, cost=lambda s: 1.0)
    assert found.names == ("right", "noisy", "quiet but wrong")
    assert found.biased == ("quiet but wrong",)
    assert found.prices["quiet but wrong"] < found.prices["right"]
    assert found.probability_best == {"right": 1.0, "noisy": 0.0, "quiet but wrong": 0.0}
    lines = str(found).splitlines()
    assert lines[3].endswith("!")
    assert lines[4].startswith("! quiet but wrong: bias z = ")
    assert "ranked last" in lines[4]


def test_the_threshold_of_a_bias_is_calibrated_to_the_repeats():
    assert critical_z(1, 10**9) == pytest.approx(4.8916384757, abs=1e-6)  # the normal quantile of 5e-7
    assert critical_z(1, 9) == pytest.approx(13.2571351024, rel=1e-8)  # Student's t with 8 degrees of freedom
    assert critical_z(1000, 200) > critical_z(1, 200) > critical_z(1, 10**6)


def test_rich_table(parameter):
    pytest.importorskip("rich")
    from rich.console import Console

    exact = torch.zeros(3, dtype=torch.float64)
    estimates = {"[odd] name": fixed(noise(50, 1.0), parameter), "off": fixed(noise(50, 0.1, shift=1.0), parameter)}
    found = compare(estimates, parameter, exact, repeats=50)
    console = Console(width=200, file=io.StringIO())
    console.print(found)
    text = console.file.getvalue()
    assert "[odd] name" in text
    assert "! off: bias z" in text


def test_plot(parameter):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    exact = torch.zeros(3, dtype=torch.float64)
    estimates = {
        "fine": fixed(noise(50, 1.0), parameter),
        "off": fixed(noise(50, 0.1, shift=1.0), parameter),
        "exact": fixed(torch.zeros(50, 3, dtype=torch.float64), parameter),
    }
    found = compare(estimates, parameter, exact, repeats=50)
    ax = found.plot()
    assert [label.get_text() for label in ax.get_yticklabels()] == ["exact", "fine", "off (biased)"]
    assert ax.get_xscale() == "log"
    assert [bar.get_width() for bar in ax.patches] == [found.prices["fine"], found.prices["off"]]
    assert ax.patches[1].get_hatch() == "//"
    assert "no noise" in ax.texts[0].get_text()
    assert found.plot(ax) is ax
    matplotlib.pyplot.close(ax.figure)


@pytest.mark.parametrize(("package", "use"), [("rich.table", "__rich__"), ("matplotlib", "plot")])
def test_a_plain_install_is_told_what_to_install(parameter, monkeypatch, package, use):
    found = compare({"a": fixed(noise(9, 1.0), parameter)}, parameter, repeats=9)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(sf.ScorefnError, match=r"pip install scorefn\[apps\]"):
        getattr(found, use)()


def test_evaluations_of_a_bare_callable_are_not_known(parameter):
    with pytest.raises(sf.ScorefnError, match=r"\(p, f, estimator\)"):
        compare({"a": fixed(noise(9, 1.0), parameter)}, parameter, repeats=9, cost=evaluations)


@pytest.mark.parametrize("cost", ["seconds", float, None, 3])
def test_a_cost_that_is_no_function(parameter, cost):
    with pytest.raises(sf.ScorefnError, match="cost must be a function"):
        compare({"a": fixed(noise(9, 1.0), parameter)}, parameter, repeats=9, cost=cost)


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_a_cost_that_is_no_number(parameter, value):
    with pytest.raises(sf.ScorefnError, match='cost of "a"'):
        compare({"a": fixed(noise(9, 1.0), parameter)}, parameter, repeats=9, cost=lambda s: value)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95])
def test_a_confidence_out_of_range(parameter, confidence):
    with pytest.raises(sf.ScorefnError, match=f"between 0 and 1.*{confidence}"):
        compare({"a": lambda: parameter.sum()}, parameter, repeats=9, confidence=confidence)


def test_means_that_agree_differ_or_are_not_known():
    one = noise(4000, 1.0, 0, shift=1.0)
    assert equivalence(one, noise(4000, 1.0, 1, shift=1.0)).worst < 0.15
    assert not equivalence(one, noise(4000, 1.0, 1, shift=1.0)).refuted
    assert equivalence(one, noise(4000, 1.0, 1, shift=1.3)).refuted
    unclear = equivalence(one, noise(20, 1.0, 1, shift=1.0))
    assert unclear.worst > 0.5
    assert not unclear.refuted
    shift = equivalence(torch.full((9, 2), 1.5), torch.full((9, 2), 1.0))  # no noise at all
    assert (shift.refuted, shift.difference) == (True, 0.5)
