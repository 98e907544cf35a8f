"""The programs of ``applications/rl``: what they say is exact is, and all of them run."""

import importlib
import itertools
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import scorefn as sf
from applications.over_seeds import bootstrap, interquartile_mean
from applications.rl import contextual_bandit, course, exact_gridworld, inventory
from applications.rl.exact_gridworld import Gridworld, Problem

# ------------------------------------------------------------------------------------------------------------ gridworld


@pytest.fixture(scope="module")
def problem():
    return Problem(Gridworld(horizon=4))


@pytest.fixture(scope="module")
def rows(problem):
    return {row.name: row for row in problem.table()}


@pytest.mark.parametrize("world", [Gridworld(horizon=4), Gridworld(("S.#", ".PG"), slip=0.4, horizon=5)])
@pytest.mark.parametrize("discount", [0.4, 0.7, 1.0])
def test_four_computations_of_the_gradient_agree(world, discount):
    found = Problem(world, discount, seed=3)
    gradients = torch.stack(list(found.gradients().values()))
    assert len(gradients) == 4
    assert gradients.norm(dim=(-2, -1)).min() > 1e-2
    assert (gradients.amax(0) - gradients.amin(0)).max() < 1e-10


def test_all_trajectories_were_enumerated(problem):
    assert abs(problem.probability.sum().item() - 1) < 1e-12
    assert len(torch.unique(torch.cat([problem.tau.observations, problem.tau.actions], -1), dim=0)) < len(
        problem.probability
    )  # a slip and a wall end in the same cell, but rewards and next cells differ
    states = problem.tau.next_observations % len(problem.world.cells)
    assert (states[:, :-1] == (problem.tau.observations % len(problem.world.cells))[:, 1:]).all()


def test_what_is_biased_and_what_is_not(rows):
    biased = {name for name, row in rows.items() if row.bias > 1e-12}
    assert biased == {
        "reward-to-go, without discount^t",
        "GAE 0, V without time",
        "GAE 0.5, V without time",
        "GAE 0.9, V without time",
        "GAE 0.9, true V, without discount^t",
    }
    assert all(rows[name].bias > 1e-3 for name in biased)


def test_the_order_of_the_variances(rows):
    def falls(*names):
        variances = [rows[name].variance for name in names]
        assert variances == sorted(variances, reverse=True)

    falls("total return", "total return, leave-one-out", "reward-to-go, leave-one-out")
    falls("total return", "reward-to-go", "reward-to-go, leave-one-out", "reward-to-go, optimal constants")
    falls("reward-to-go", "reward-to-go, true V", "GAE 0.9, true V", "GAE 0.5, true V", "GAE 0, true V")
    assert rows["GAE 1, true V"].variance == pytest.approx(rows["reward-to-go, true V"].variance, rel=1e-12)


def test_no_other_constants_are_better(problem):
    credit = sf.RewardToGo(problem.discount)
    draws = problem.draws(problem.rewards)
    best = problem.optimal_constants(draws.signal(credit))

    def variance(constants):
        draws = problem.draws(problem.rewards)
        estimates = problem.estimates(draws, credit, sf.Constant(constants))
        return problem.independent("", estimates).variance

    for step in range(problem.world.horizon):
        moved = torch.zeros_like(best)
        moved[step] = 1e-3
        assert variance(best) < min(variance(best + moved), variance(best - moved))


@pytest.mark.parametrize("reducer", [sf.LeaveOneOut(), "adaptive"])
def test_leave_one_out_of_two_episodes_by_all_pairs(reducer):
    small = Problem(Gridworld(("S.G",), slip=0.3, horizon=3))
    credit, size = sf.RewardToGo(small.discount), len(small.probability)
    all_draws = small.draws(small.rewards).bound(credit)
    signal = all_draws.signal()
    baseline = reducer
    if reducer == "adaptive":
        baseline = small.adaptive()
        assert baseline.coefficient(signal).abs().max() > 1e-2
        signal = signal + baseline.coefficient(signal) * all_draws.uninfluenced
    first, second = torch.cartesian_prod(torch.arange(size), torch.arange(size)).unbind(-1)
    pairs = replace(all_draws[torch.cat([first, second])], group=torch.arange(size**2).repeat(2))
    log_prob = pairs.log_prob.detach().requires_grad_()
    surrogate = sf.surrogate(replace(pairs, log_prob=log_prob), baseline=baseline)
    charged = torch.autograd.grad(surrogate.sum(), log_prob)[0]  # signal minus baseline
    each = torch.einsum("nk,nkp->np", charged, small.scores[torch.cat([first, second])])
    batch = (each[: size**2] + each[size**2 :]) / 2
    weight = small.probability[first] * small.probability[second]
    mean = weight @ batch
    assert mean == pytest.approx(small.gradients()["sum over trajectories"].flatten(), abs=1e-12)
    row = small.leave_one_out("", signal, episodes=2)
    assert row.bias < 1e-12
    assert row.variance == pytest.approx(2 * (weight @ (batch - mean).square().sum(-1)).item(), rel=1e-10)


def test_the_table_is_that_of_the_page(capsys, tmp_path, monkeypatch):
    assert exact_gridworld.main(["--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert (tmp_path / "gridworld.png").stat().st_size > 10_000
    page = (Path(__file__).parents[1] / "docs" / "gallery" / "gridworld.md").read_text(encoding="utf-8")
    table = [line for line in printed if line.startswith("|")]
    assert len(table) == 2 + 18
    assert "\n".join(table) in page


# ----------------------------------------------------------------------------------------------------- numbered scripts

SCRIPTS = ["1_reinforce", "2_reward_to_go", "3_leave_one_out", "4_value_function", "5_gae", "6_ppo_clip"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_improves(name, capsys):
    returns = importlib.import_module(f"applications.rl.{name}").main(seed=1, updates=5)
    assert len(returns) == 5
    assert returns[-1] > returns[0] + 5
    assert "update   5: mean return" in capsys.readouterr().out


@pytest.mark.parametrize(("before", "after"), list(itertools.pairwise(SCRIPTS)))
def test_neighbours_differ_in_a_handful_of_lines(before, after):
    def code(name):
        text = (Path(course.__file__).parent / f"{name}.py").read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 70
        return set(re.sub(r'^""".*?"""\n', "", text, count=1, flags=re.DOTALL).splitlines()) - {""}

    assert 1 <= len(code(after) - code(before)) <= 15


# --------------------------------------------------------------------------------------------------------------- course


def test_a_quick_grid_is_not_run_again(tmp_path, capsys, monkeypatch):
    threads = torch.get_num_threads()
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- cartpole: written by the program -->\nold\n<!-- cartpole: end -->\nb\n")
    arguments = ["--experiment", "cartpole", "--quick", "--seeds", "1", "--out", str(tmp_path), "--page", str(page)]
    assert course.main(arguments) == 0
    first = capsys.readouterr().out
    assert first.count("seed 0:") == 8
    assert (tmp_path / "cartpole-quick.png").stat().st_size > 10_000
    written = page.read_text()
    assert written.startswith("a\n<!-- cartpole: written by the program -->\n\n| CartPole-v1")
    assert "old" not in written
    assert written.endswith("<!-- cartpole: end -->\nb\n")
    assert course.main(arguments) == 0
    again = capsys.readouterr().out
    assert "seed 0:" not in again
    assert again.splitlines() == [line for line in first.splitlines() if "seed 0:" not in line]
    torch.set_num_threads(threads)


def test_batches_hold_about_as_many_steps_as_were_asked_for(monkeypatch):
    settings = course.experiments()["cartpole"].variants["small, reward-to-go, normalised"]
    training = course.StepBatches(settings, seed=0)
    sizes = []
    for _ in range(12):
        before = training.env_steps
        training.update()
        sizes.append(training.env_steps - before)
    assert min(sizes) > 700
    assert max(sizes) < 1800
    assert training.length > 22
    assert len(training.curve) == 12


def test_every_experiment_has_its_section():
    page = (Path(__file__).parents[1] / "docs" / "gallery" / "course.md").read_text(encoding="utf-8")
    for name, experiment in course.experiments().items():
        assert page.count(f"<!-- {name}: written by the program -->") == 1
        assert page.count(f"<!-- {name}: end -->") == 1
        for settings in experiment.variants.values():
            assert json.loads(json.dumps(settings.state()))["total_steps"] > 0
    with pytest.raises(ValueError, match="has no section for pong"):
        course.fill(Path(__file__), "pong", "")


# ---------------------------------------------------------------------------------------------------- one-step problems


def test_the_bandits_estimates_are_unbiased_and_it_learns():
    x, y, _, _ = contextual_bandit.digits()
    policy, value = contextual_bandit.network(10), contextual_bandit.network(1)
    x, y = x[:3], y[:3]
    exact = contextual_bandit.flat(contextual_bandit.exact_reward(policy, x, y), policy)
    pairs = torch.cartesian_prod(*[torch.arange(10)] * 2)
    for name in contextual_bandit.MEASURED:
        baseline = contextual_bandit.baseline_of(name, value, x)
        total = torch.zeros_like(exact)
        for i in range(3):  # contexts do not meet: two guesses for one of them, all pairs at once
            p = torch.distributions.Categorical(logits=policy(x[i : i + 1]))
            log_prob = p.log_prob(pairs.T.reshape(-1, 1)).unsqueeze(-1)
            fx = (pairs.T.reshape(-1, 1) == y[i]).float().unsqueeze(-1)
            draws = sf.Draws(pairs.T.reshape(-1, 1), log_prob, fx, group=torch.arange(100).repeat(2))
            one = contextual_bandit.baseline_of(name, value, x[i : i + 1]) if name == "value function" else baseline
            estimate = sf.surrogate(draws, baseline=one).view(2, 100).mean(0)
            weight = log_prob.detach().view(2, 100).sum(0).exp()
            total += contextual_bandit.flat(weight @ estimate, policy) / 3
        assert (total - exact).norm() < 1e-5 * exact.norm()
    config = contextual_bandit.Config(updates=150, repeats=20, measured_at=(150,))
    for name in contextual_bandit.ESTIMATORS:  # with all ten guesses the last two are exact
        whole = contextual_bandit.flat(contextual_bandit.estimate(name, policy, x, y, 10), policy)
        assert torch.allclose(whole, exact, rtol=1e-4, atol=1e-7) == (name != "ARMS")
    run = contextual_bandit.train("leave-one-out", config)
    assert run.accuracy > 0.85
    assert all(len(noise) == 1 for noise in run.noise.values())
    assert "| leave-one-out |" in contextual_bandit.report({"leave-one-out": run}, config)


@pytest.mark.parametrize("price", [3.5, 5.0, 9.0])
def test_the_optimum_of_one_day_is_the_newsvendors(price):
    shop = inventory.Shop(price=price, delivery=0.0, horizon=1)
    value, orders = shop.optimum()
    assert orders[0, 0] == inventory.newsvendor(shop)
    p = shop.demand_probabilities()
    size = torch.arange(shop.capacity + 1)
    sold = torch.minimum(size, orders[0, 0])
    left = orders[0, 0] - sold
    earned = (shop.price * sold - shop.cost * orders[0, 0] - shop.holding * left + shop.salvage * left).double() @ p
    assert value == pytest.approx(earned.item())


def test_no_policy_earns_more_than_the_optimum():
    shop = inventory.Shop(capacity=8, horizon=4)
    value, orders = shop.optimum()
    best = torch.full((4, 9, 9), -torch.inf, dtype=torch.float64).scatter(-1, orders.unsqueeze(-1), 0.0)
    assert shop.expected_profit(best).item() == pytest.approx(value)
    noise = torch.randn(20, 4, 9, 9, dtype=torch.float64).where(shop.allowed(torch.arange(9)), -torch.inf)
    assert all(shop.expected_profit(logits.log_softmax(-1)) < value for logits in noise)


def test_the_inventorys_estimate_is_the_exact_gradient():
    shop = inventory.Shop(demand=1.0, capacity=2, horizon=2)
    policy = inventory.OrderPolicy(shop, hidden=4).double()
    choices = torch.cartesian_prod(*[torch.arange(3)] * 4)  # two orders and two demands
    stock, weight, columns = torch.zeros(len(choices), dtype=torch.long), torch.ones(len(choices)).double(), []
    for t in range(2):
        order, demand = choices[:, t], choices[:, 2 + t]
        profit, left = shop.day(stock, order, demand)
        weight = weight * shop.demand_probabilities()[demand] * (stock + order <= 2)
        columns.append((stock, order, profit + (shop.salvage * left if t else 0)))
        stock = left
    possible = weight > 0
    days = inventory.Days(*(torch.stack(column, -1)[possible] for column in zip(*columns, strict=True)))
    draws = inventory.Seasons(shop, policy).score(inventory.profits, days)
    weight = weight[possible] * draws.log_prob.detach().sum(-1).exp()
    assert weight.sum().item() == pytest.approx(1)
    parameters = list(policy.parameters())
    exact_value = shop.expected_profit(policy.table())
    assert (weight @ sf.surrogate(draws)).item() == pytest.approx(exact_value.item())
    exact = torch.autograd.grad(exact_value, parameters)
    estimate = torch.autograd.grad(weight @ sf.surrogate(draws), parameters)
    for found, wanted in zip(estimate, exact, strict=True):
        assert (found - wanted).abs().max() < 1e-10
    assert max(g.abs().max() for g in exact) > 1e-3


def test_a_day_is_learned():
    run = inventory.train(inventory.Shop(horizon=1), updates=150, rate=0.005)
    assert run.share > 0.97
    assert 0.97 < run.greedy_share <= 1.0


# ----------------------------------------------------------------------------------------------------------- statistics


def test_the_interquartile_mean():
    assert interquartile_mean([100.0, 2.0, 3.0, 4.0, -50.0]) == pytest.approx(3.0)
    assert interquartile_mean([5.0, 1.0, 3.0]) == pytest.approx(3.0)  # nothing to drop
    assert interquartile_mean([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 100.0]) == pytest.approx(3.5)
    assert interquartile_mean([[1.0, 9.0], [3.0, 9.0]], axis=0).tolist() == [2.0, 9.0]
    with pytest.raises(ValueError, match="of no scores"):
        interquartile_mean([])


def test_the_bootstraps_interval_of_two_scores_is_exact():
    # resamples: both low, both high, one of each; at level .4 the interval ends at the quantiles .3 and .7
    assert bootstrap([0.0, 1.0], level=0.4) == (0.5, 0.5, 0.5)
    assert bootstrap([0.0, 1.0], level=0.6) == (0.5, 0.0, 1.0)
    assert bootstrap([7.0]) == (7.0, 7.0, 7.0)
    assert bootstrap([0.0, 1.0, 5.0], seed=3) == bootstrap([0.0, 1.0, 5.0], seed=3)


def test_strata_are_resampled_apart():
    mean = np.mean
    assert bootstrap([[1.0, 1.0], [5.0]], mean) == pytest.approx((7 / 3, 7 / 3, 7 / 3))  # nothing varies within
    whole = bootstrap([1.0, 1.0, 5.0], mean)
    assert whole.low < 7 / 3 < whole.high


def test_the_interval_covers_the_mean_about_as_often_as_it_says():
    scores = np.random.default_rng(0).normal(size=(200, 20))
    inside = [i.low < 0 < i.high for i in (bootstrap(row, np.mean, resamples=500) for row in scores)]
    assert 0.86 < np.mean(inside) < 0.97  # of 20 scores, the percentile interval has about .93


@pytest.mark.parametrize(("strata", "level", "message"), [
    ([], 0.95, "one finite score"), ([1.0, float("nan")], 0.95, "one finite score"), ([[1.0], []], 0.95, "one finite"),
    ([1.0], 1.0, "level must lie between 0 and 1, but it is 1.0"),
])  # fmt: skip
def test_bad_scores_are_refused(strata, level, message):
    with pytest.raises(ValueError, match=message):
        bootstrap(strata, level=level)


def test_an_interval_reads_well():
    assert str(bootstrap([0.5])) == "0.500 [0.500, 0.500]"
    assert str(bootstrap([1234.5, 1234.5])) == "1,234 [1,234, 1,234]"
