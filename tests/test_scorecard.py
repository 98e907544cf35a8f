"""The scorecard: its exact answers, its judge, its protocol, its page. No peer is needed."""

import ast
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributions import Bernoulli, Categorical, Independent, Uniform

import scorefn as sf
from applications.benchmarks.scorecard import __main__ as program
from applications.benchmarks.scorecard import page, problems, protocol
from applications.benchmarks.scorecard import trajectories as sequential
from applications.benchmarks.scorecard.environments import PEERS
from applications.benchmarks.scorecard.judge import judge, verdict_of
from applications.benchmarks.scorecard.peers import hand_written, torch_side
from applications.benchmarks.scorecard.problems import PROBLEMS, named
from applications.benchmarks.scorecard.protocol import Answer, Peer

ROOT = Path(problems.__file__).parent


@pytest.fixture(autouse=True)
def _threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


# The exact answers ----------------------------------------------------------------------------------------------------
KNOWN = {
    "bernoulli-.5": [0.25],
    "bernoulli-.3": [0.21],
    "shared-0": [-0.045],
    "shared-4": [-0.00317929],
    "elbo": [0.0366883],
    "branch": [0.0366883],
    "iw-2": [0.01810355],
    "iw-5": [0.00716539],
    "second-order": [-0.0474215],
    "independent-200": [200 * 2.5e-6],
    "normal": [2.0],
    "chain": [1.0],
    "discount": [0.1],
    "moving-support": [0.0, 1.0],
}


@pytest.mark.parametrize("name", KNOWN)
def test_the_anchors_are_the_known_numbers(name):
    np.testing.assert_allclose(named(name).exact, KNOWN[name], rtol=2e-6, atol=1e-12)


@pytest.mark.parametrize("name", ["bernoulli-.5", "bernoulli-.3", "bernoulli-.1", "shared-0", "shared-4", "bandit"])
def test_the_anchors_are_what_scorefn_enumerates(name):
    problem = named(name)
    parameters = torch.tensor(problem.start, requires_grad=True)
    if name == "bandit":
        rewards = torch.tensor(sequential.REWARDS)
        p, f = Categorical(logits=parameters), lambda a: rewards[a]
    elif name.startswith("shared"):
        p, f = Independent(Bernoulli(logits=parameters.expand(3)), 1), torch_side.shared_cost
    else:
        p, f = Bernoulli(logits=parameters[0]), lambda b: b
    (exact,) = sf.diagnostics.exact_gradient(p, f, [parameters])
    np.testing.assert_allclose(problem.exact, exact.numpy(), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("K", [1, 2, 5])
def test_the_bound_gradient_is_the_derivative_of_the_bound(K):
    h = 1e-5
    slope = (problems.bound(K, problems.GUIDE + h) - problems.bound(K, problems.GUIDE - h)) / (2 * h)
    assert problems.bound_gradient(K) == pytest.approx(slope, rel=1e-7)


def test_the_token_gradient_is_the_derivative_of_the_expected_reward():
    chance = np.exp(sequential.token_log_probabilities().sum(-1))
    assert len(chance) == 15
    assert chance.sum() == pytest.approx(1.0, abs=1e-12)
    h, slopes = 1e-6, []
    for i in range(sequential.TABLE.size):
        moved = [sequential.TABLE.copy() for _ in range(2)]
        moved[0].flat[i] += h
        moved[1].flat[i] -= h
        high, low = (np.exp(sequential.token_log_probabilities(table).sum(-1)) @ sequential.PAYS for table in moved)
        slopes.append((high - low) / (2 * h))
    np.testing.assert_allclose(named("tokens").exact, slopes, atol=1e-9)


def test_the_advantages_bootstrap_at_the_cut():
    rows = (sequential.REWARD, sequential.VALUE, sequential.NEXT_VALUE, sequential.TERMINATED, sequential.TRUNCATED)
    rewards, values, next_values, terminated, truncated = (torch.tensor(row)[None] for row in rows)
    found = sf.trajectories.gae(
        rewards, values, next_values, terminated, terminated | truncated, discount=0.9, lambda_=0.8
    )
    np.testing.assert_allclose(named("advantages").exact, found[0].numpy(), rtol=1e-12)
    assert abs(sequential.advantages(bootstrap=False) - named("advantages").exact).max() > 1


@pytest.mark.parametrize(
    ("name", "estimator", "variance"),
    [
        ("shared-0", "score function, 1 draw", 0.438420),
        ("shared-0", "baseline E f, 1 draw", 0.004650),
        ("shared-0", "leave-one-out, 2 draws", 0.0072750),
        ("shared-0", "leave-one-out, 4 draws", 0.0019875),
        ("shared-4", "leave-one-out, 2 draws", 3.81025e-4),
        ("shared-4", "leave-one-out, 4 draws", 1.82276e-4),
        ("bernoulli-.3", "leave-one-out, 2 draws", 0.06090),
        ("bernoulli-.3", "ARM, 2 evaluations", 0.03390),
        ("bernoulli-.3", "DisARM, 2 evaluations", 0.02940),
        ("chain", "full return", 192 / 16),
        ("chain", "reward-to-go", 88 / 16),
        ("chain", "reward-to-go, best constant", 16 / 16),
    ],
)
def test_the_reference_variances_are_the_known_numbers(name, estimator, variance):
    assert named(name).references[estimator] == pytest.approx(variance, rel=2e-6)


# The judge ------------------------------------------------------------------------------------------------------------
def noise(n, width=1, seed=0):
    return np.random.default_rng(seed).normal(size=(n, width))


@pytest.mark.parametrize(
    ("factor", "spread", "n", "verdict"),
    [
        (1.0, 0.3, 200_000, "right"),
        (1.0, 0.3, 100, "no bias found"),
        (0.95, 0.3, 200_000, "biased"),
        (0.97, 0.05, 20_000, "biased"),
        (1.01, 0.1, 200_000, "right"),  # a bias below the tolerance, and shown to be
        (-0.5, 0.3, 20_000, "wrong sign"),
        (1.0, 0.0, 40, "right"),
        (0.0, 0.0, 40, "zero"),
        (1.0, 0.3, 5, "undecided"),
    ],
)
def test_the_judge_on_one_coordinate(factor, spread, n, verdict):
    problem = named("bernoulli-.3")
    assert judge(problem, problem.exact * (factor + spread * noise(n))).verdict == verdict


def test_the_judge_says_how_large_a_bias_is():
    problem = named("bernoulli-.3")
    found = judge(problem, problem.exact * (0.95 + 0.3 * noise(200_000)))
    assert found.bias == pytest.approx(-0.05, abs=0.004)
    assert found.scale == pytest.approx(0.95, abs=0.004)
    assert found.margin < 0.004
    assert found.variance == pytest.approx((0.3 * 0.21) ** 2, rel=5 * (2 / 200_000) ** 0.5)  # five standard errors


def test_a_coordinate_that_points_the_other_way_is_named():
    problem = named("bandit")
    found = judge(problem, problem.exact * np.array([1.0, -1.0, 1.0]) + 0.1 * noise(50_000, 3))
    assert found.verdict == "wrong sign"
    assert "1 of 3" in found.detail


def test_skewed_estimates_get_no_verdict():
    problem = named("bernoulli-.3")
    rare = (np.random.default_rng(0).random((5000, 1)) < 0.002) / 0.002
    assert judge(problem, problem.exact * rare).verdict == "undecided"


def test_not_finite_moves_and_direction():
    assert judge(named("normal"), np.array([[1.0], [np.nan]])).verdict == "not finite"
    assert judge(named("flat-fitness"), np.zeros((40, 1))).verdict == "right"
    assert judge(named("flat-fitness"), 0.1 + noise(40) ** 2).verdict == "moves"
    assert judge(named("nan-fitness"), -3.0 + noise(40)).verdict == "right"
    assert judge(named("nan-fitness"), 3.0 + noise(40)).verdict == "wrong sign"


def test_an_answer_without_randomness_is_judged_at_once():
    problem = named("advantages")
    assert judge(problem, problem.exact[None], exact_once=True).verdict == "right"
    assert judge(problem, sequential.advantages(bootstrap=False)[None], exact_once=True).verdict == "biased"


def test_an_error_is_a_refusal_only_where_there_is_something_to_refuse():
    record = {"status": "refused", "error": "SupportError: it moves"}
    assert verdict_of(record, named("moving-support"), None).verdict == "refuses"
    assert verdict_of(record, named("normal"), None).verdict == "crashes"
    assert verdict_of(record | {"status": "crashed"}, named("moving-support"), None).verdict == "crashes"


# The protocol ---------------------------------------------------------------------------------------------------------
def small_peer() -> Peer:
    peer = Peer("small", packages=("numpy", "no-such-package"))

    @peer.row("normal", "exact", link="", evaluations=1)
    def exact(problem):
        return Answer(one=lambda: [2.0], many=lambda count: np.full((count, 1), 2.0), chunk=50)

    @peer.row("elbo", "stumbles", link="")
    def stumbles(problem):
        return Answer(one=lambda: {}["missing"])

    @peer.row("moving-support", "refuses", link="")
    def refuses(problem):
        ends = torch.tensor([-1.0, 2.0], requires_grad=True)
        return Answer(one=lambda: sf.expectation(Uniform(ends[0], ends[1]), lambda x: x**2, 2))

    @peer.row("bandit", "gives two of three numbers", link="")
    def short(problem):
        return Answer(one=lambda: [1.0, 2.0])

    peer.lacks("second-order", "nothing of the kind")
    return peer


def test_a_worker_writes_what_happened(tmp_path):
    small_peer().main(["--out", str(tmp_path), "--repeats", "200", "--seconds", "5"])
    whole = json.loads((tmp_path / "small.json").read_text())
    rows = {row["problem"]: row for row in whole["rows"]}
    assert {name: row["status"] for name, row in rows.items()} == {
        "normal": "ran",
        "elbo": "crashed",
        "moving-support": "refused",
        "bandit": "crashed",
        "second-order": "not offered",
    }
    assert rows["elbo"]["error"] == "KeyError: 'missing'"
    assert "the worker gave 2 numbers per estimate, bandit has 3" in rows["bandit"]["error"]
    assert rows["normal"]["at_once"]
    assert rows["normal"]["seconds"] > 0
    assert rows["normal"]["yardstick"] > 0
    assert 'peer.row("normal", "exact"' in rows["normal"]["usage"]
    with np.load(tmp_path / "small.npz") as arrays:
        assert arrays[rows["normal"]["array"]].shape == (200, 1)


def test_a_problem_asked_again_leaves_the_others(tmp_path):
    options = ["--out", str(tmp_path), "--repeats", "60"]
    small_peer().main(options)
    small_peer().main([*options, "--problems", "elbo"])
    results = page.load(tmp_path)
    assert len(results.rows) == 5
    found = {row.problem: row.judgement.verdict for row in results.rows}
    assert found["normal"] == "right"
    assert found["elbo"] == "crashes"


def test_a_problem_that_does_not_exist_is_refused_by_name():
    with pytest.raises(KeyError, match=r"there is no problem 'bernouli'; there are bernoulli-\.5"):
        named("bernouli")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--peers", "pyroo"], "there is no peer 'pyroo': choose among scorefn"),
        (["--problems", "elbow"], "there is no problem 'elbow': choose among bernoulli-.5"),
        (["--seconds", "-1"], "it is -1, but must be a positive number of seconds"),
        (["--seconds", "soon"], "'soon' is no number of seconds"),
    ],
)
def test_bad_arguments_are_refused(arguments, words, capsys):
    with pytest.raises(SystemExit):
        program.main(arguments)
    assert words in capsys.readouterr().err


def test_every_peer_has_a_worker_that_runs_alone():
    shared = {"__init__", "torch_side", "from_jax"}
    files = {path.stem: path for path in (ROOT / "peers").glob("*.py") if path.stem not in shared}
    assert set(files) == set(PEERS)
    for name, path in files.items():
        source = path.read_text(encoding="utf-8")
        assert len(source.splitlines()) < 400
        assert f'Peer("{name}"' in " ".join(source.split()).replace("Peer( ", "Peer(")
        tree = ast.parse(source)
        modules = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        modules += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
        if name != "scorefn":
            assert not any(module.split(".")[0] == "scorefn" for module in modules)


# The page -------------------------------------------------------------------------------------------------------------
def test_the_pages_render_from_stored_results(tmp_path):
    options = ["--seconds", "0.3", "--repeats", "4000", "--out", str(tmp_path)]
    hand_written.peer.main(["--problems", "columns,moving-support,second-order", *options])
    small_peer().main(["--out", str(tmp_path), "--repeats", "60"])
    failed = {
        "peer": "relaxit",
        "versions": {},
        "rows": [{"problem": "", "status": "not installed", "error": "no | wheel"}],
    }
    (tmp_path / "relaxit.json").write_text(json.dumps(failed))
    pages = page.write(page.load(tmp_path), tmp_path / "card.md")
    assert [path.name for path in pages] == ["card.md", "card_anchors.md", "card_trajectories.md", "card_traps.md"]
    assert all(f"card_{part}\n" in pages[0].read_text() for part in page.PARTS)
    assert "{doc}`card`" in pages[1].read_text()
    text = "".join(path.read_text() for path in pages)
    assert "## second-order" in text
    assert "torch.distributions, by hand" in text
    assert "not installed: no \\| wheel" in text
    assert "Not offered: small: nothing of the kind." in text
    lines = [
        line for line in text.splitlines() if line.startswith("| torch.distributions, by hand | [`log_prob(x) * f`")
    ]
    assert len(lines) == 1
    assert "**wrong sign**" in lines[0]


def test_hand_written_rows_are_the_anchors_they_claim():
    answer = hand_written.leave_one_out(PROBLEMS["shared-0"])
    torch.manual_seed(0)
    gradients = answer.many(100_000)
    found = judge(PROBLEMS["shared-0"], gradients.reshape(-1, 1))
    assert found.verdict in ("right", "no bias found")
    squares = (gradients - gradients.mean()) ** 2
    error = 5 * float(squares.std()) / len(gradients) ** 0.5  # standard errors
    assert found.variance == pytest.approx(PROBLEMS["shared-0"].references["leave-one-out, 2 draws"], abs=error)


def test_the_yardstick_measures():
    assert 0.001 < protocol.yardstick() < 10
