"""The repeated prisoner's dilemma: exact values, estimates summed over all matches, and the program."""

import itertools
import json
from dataclasses import replace

import pytest
import torch

import scorefn as sf
from applications.rl import opponent_shaping
from applications.rl.opponent_shaping import beginners, gradient, learn
from applications.rl.repeated_game import Game, Matches, Rounds, log_outcomes
from tests.oracles.toys import coordinates

GAME = Game(discount=0.8)
T = 3


def every_match(rounds=T):
    outcomes = torch.tensor(list(itertools.product(range(4), repeat=rounds)))
    states = torch.cat([torch.zeros(len(outcomes), 1, dtype=torch.long), outcomes[:, :-1] + 1], -1)
    return Rounds(states, outcomes)


def over_all_tuples(N, baseline, rounds):
    """A value that is the expectation of the sampled one, by its sum over all N-tuples of matches."""

    def value(policies, player):
        played = every_match(rounds)
        chosen = coordinates(*[len(played.states)] * N).T
        reward = GAME.rewards(player)
        tuples = Rounds(*(leaf[chosen] for leaf in played))
        draws = Matches(GAME, policies, rounds).score(lambda found: reward[found.outcomes], tuples)
        probability = draws.log_prob.detach().sum(-1).exp().prod(0)
        assert abs(float(probability.sum()) - 1) < 1e-12
        return probability @ sf.dice(draws, baseline=baseline).mean(0)

    return value


def exact(rounds):
    return lambda policies, player: GAME.value(policies, player, rounds)


@pytest.mark.parametrize("steps", [0, 1, 2])
@pytest.mark.parametrize("player", [0, 1])
@pytest.mark.parametrize(
    ("N", "rounds", "baseline"),
    [
        (1, T, None),
        (1, T, sf.Constant(-1.3)),
        (2, 2, sf.LeaveOneOut()),
        (2, 2, sf.RegressionBaseline()),
    ],
    ids=["none", "a number", "leave-one-out", "state values"],
)
def test_the_sampled_gradient_is_the_exact_one_in_expectation(N, rounds, baseline, player, steps):
    """The expectation is that of each step, where estimates are linear; two steps ahead take a third derivative."""
    policies = beginners(3)
    found = gradient(over_all_tuples(N, baseline, rounds), policies, player, 7.5, steps)
    truth = gradient(exact(rounds), policies, player, 7.5, steps)
    assert truth.abs().max() > 1e-2
    assert float((found - truth).abs().max() / truth.abs().max()) < 1e-10


def test_the_step_is_differentiated():
    """Neither the naive gradient nor that after a step taken as a constant would pass for it."""
    policies = beginners(3)
    found = gradient(GAME.value, policies, 0, 7.5)
    ahead = torch.stack([policies[0], policies[1] + 7.5 * gradient(GAME.value, policies, 1, 0.0, 0)])
    for other in (gradient(GAME.value, policies, 0, 7.5, 0), gradient(GAME.value, ahead, 0, 7.5, 0)):
        assert (found - other).norm() > 0.1 * found.norm()


@pytest.mark.parametrize("player", [0, 1])
def test_the_linear_system_is_the_limit_of_many_rounds(player):
    policies = beginners(1).requires_grad_()
    endless, long = GAME.value(policies, player), GAME.value(policies, player, 400)
    assert abs(endless.item() - long.item()) < 1e-12
    gap = [torch.autograd.grad(value, policies)[0] for value in (endless, long)]
    assert (gap[0] - gap[1]).abs().max() < 1e-12


def test_both_players_see_the_same_match():
    """Swap the players, and the values swap."""
    policies = beginners(1)
    for player in (0, 1):
        assert float(GAME.value(policies, player)) == pytest.approx(float(GAME.value(policies.flip(0), 1 - player)))
    assert float((log_outcomes(policies).exp().sum(-1) - 1).abs().max()) < 1e-12


@pytest.mark.parametrize(("logit", "value"), [(40.0, -1.0), (-40.0, -2.0)])
def test_known_values(logit, value):
    policies = torch.full((2, 5), logit, dtype=torch.float64)
    assert [float(GAME.value(policies, player)) for player in (0, 1)] == pytest.approx([value, value])
    one = torch.stack([policies[0], -policies[1]])
    paid = [-3.0, 0.0] if logit > 0 else [0.0, -3.0]
    assert [float(GAME.value(one, player)) for player in (0, 1)] == pytest.approx(paid)


def test_matches_are_played_as_they_are_scored():
    """The frequency of each of the 64 matches: 10^5 played, false-alarm rate 1e-6 over all."""
    policies, count = beginners(2), 100_000
    played = Matches(GAME, policies, T).play(count)
    assert (played.states[:, 1:] == played.outcomes[:, :-1] + 1).all()
    code = (played.outcomes * torch.tensor([16, 4, 1])).sum(-1).bincount(minlength=64) / count
    scored = Matches(GAME, policies.requires_grad_(), T).score(lambda found: found.outcomes, every_match())
    p = scored.log_prob.detach().sum(-1).exp()
    assert ((code - p).abs() < 5.7 * (p * (1 - p) / count).sqrt() + 1 / count).all()


def test_exact_learners_end_where_they_should():
    game = Game()
    for steps, low, high in ((0, -2.01, -1.98), (1, -1.15, -0.99)):
        values = (
            learn(game, game.value, beginners(0), 200, inner_steps=steps, rate=2.5, inner_rate=7.5).curve[-1].values
        )
        assert low < sum(values) / 2 < high


@pytest.mark.parametrize("discount", [1.0, -0.1, float("nan")])
def test_a_discount_that_has_no_mean_is_refused(discount):
    with pytest.raises(ValueError, match=r"discount is .* needs one in \[0, 1\)"):
        replace(GAME, discount=discount)


def test_matches_are_not_coupled():
    with pytest.raises(sf.ScorefnError, match="played independently"):
        sf.draw(Matches(GAME, beginners(0), T), lambda played: played.outcomes, 4, coupling=sf.Antithetic())


# -------------------------------------------------------------------------------------------------------------- program

SMALL = ["--updates", "3", "--matches", "4", "--rounds", "5", "--repeats", "2", "--seed", "3"]


def test_the_program_writes_its_result_and_repeats_itself(tmp_path, capsys):
    for run in ("one", "two"):
        assert opponent_shaping.main([*SMALL, "--out", str(tmp_path / run)]) == 0
    told = [json.loads((tmp_path / run / "result.json").read_text(encoding="utf-8")) for run in ("one", "two")]
    assert told[0]["complete"] is True
    rows = [[(row["learner"], row["values"]) for row in each["learners"]] for each in told]
    assert rows[0] == rows[1]
    assert len(rows[0]) == 6
    assert told[0]["noise"] == told[1]["noise"]
    assert (tmp_path / "one" / "opponent_shaping.png").stat().st_size > 10_000
    assert not list(tmp_path.rglob("*.part"))
    assert "looks ahead, exact: -" in capsys.readouterr().out


def test_an_interrupted_program_tells_what_was_learned(tmp_path, monkeypatch):
    monkeypatch.setattr(opponent_shaping.Interruption, "__call__", lambda self: True)
    assert opponent_shaping.main([*SMALL, "--out", str(tmp_path)]) == 130
    told = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert told["complete"] is False
    assert [row["learner"] for row in told["learners"]] == ["naive, exact"]
    assert [point["update"] for point in told["curves"]["naive, exact"]] == [0, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--updates", "0"], "it is 0, but must be 1 or more"),
        (["--matches", "1"], "it is 1, but must be 2 or more"),
        (["--rounds", "x"], "no whole number: give 1 or more"),
        (["--baselines", "best"], "invalid choice: 'best'"),
    ],
)
def test_the_program_refuses_before_it_works(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        opponent_shaping.main([*arguments, "--out", str(tmp_path / "none")])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
