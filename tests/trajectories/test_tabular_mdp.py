"""The factors of the dynamics cancel: the same gradient with and without them, exactly."""

from dataclasses import replace

import pytest
import torch

import scorefn as sf
from applications.rl.tabular_mdp import EpisodeDistribution, TabularMDP, derivation, main, rewards


@pytest.mark.parametrize("seed", range(5))
def test_five_computations_of_the_policy_gradient_agree(seed):
    result = derivation(seed)
    assert len(result.gradients) == 5
    assert result.num_episodes == 3 * 4 * 12**2
    assert result.largest_difference < 1e-10
    assert all(gradient.abs().max() > 1e-2 for gradient in result.gradients.values())


def test_also_with_more_actions_and_certain_rewards():
    result = derivation(7, TabularMDP.random(7, actions=3, payments=1, horizon=3))
    assert result.num_episodes == 3 * 3 * 9**2
    assert result.largest_difference < 1e-10


def test_also_where_some_moves_are_impossible():
    mdp = TabularMDP.random(3)
    transition = mdp.transition.clone()
    transition[0, 1] = torch.tensor([0.0, 0.0, 1.0])
    mdp = replace(mdp, transition=transition)
    assert (mdp.log_dynamics(mdp.enumerate()) == -torch.inf).any()
    with pytest.raises(sf.NonFiniteError):  # an impossible episode has no log-probability to differentiate
        derivation(3, mdp)


def problem(seed=0, **sizes):
    mdp = TabularMDP.random(seed, **sizes)
    logits = torch.randn(mdp.reward.shape[:2], dtype=torch.float64).requires_grad_()
    p = EpisodeDistribution(mdp, logits)
    episodes = mdp.enumerate()
    return p, episodes, p.log_prob(episodes)


def test_probabilities_sum_to_one():
    p, _, log_prob = problem()
    assert abs(log_prob.exp().sum().item() - 1) < 1e-12
    (score,) = torch.autograd.grad(log_prob.exp().sum(), p.logits)
    assert score.abs().max() < 1e-12


@pytest.mark.parametrize("baseline", [None, sf.LeaveOneOut()])
def test_the_default_estimate_of_two_episodes_is_exact(baseline):
    p, episodes, log_prob = problem(states=2, actions=2, payments=1, horizon=2)
    draws = p.score(rewards, episodes)
    probability = log_prob.detach().exp()
    total = 0.0
    for i in range(len(probability)):
        for j in range(len(probability)):
            pair = draws[torch.tensor([i, j])]
            total = total + probability[i] * probability[j] * sf.surrogate(pair, baseline=baseline).mean()
    (estimate,) = torch.autograd.grad(total, p.logits)
    (exact,) = torch.autograd.grad(log_prob.exp() @ episodes.rewards.sum(-1), p.logits)
    assert (estimate - exact).abs().max() < 1e-10


def test_sampled_episodes_have_the_enumerated_probabilities():
    """400,000 draws: with a standard error of at most 0.0008, a false alarm at 0.005 is below 1e-6."""
    p, episodes, log_prob = problem(states=2, actions=2, payments=1, horizon=2)
    draws = sf.draw(p, rewards, 400_000)

    def code(x):
        return (x.states * 2 + x.actions) @ torch.tensor([4, 1])

    wanted = torch.zeros(16, dtype=torch.float64).index_add(0, code(episodes), log_prob.detach().exp())
    frequency = torch.bincount(code(draws.x), minlength=16) / 400_000
    assert (frequency - wanted).abs().max() < 0.005


def test_the_report_and_the_program(capsys):
    assert main() == 0
    printed = capsys.readouterr().out
    assert "1728 episodes" in printed
    assert "largest difference between any two" in printed


def test_a_coupling_is_refused():
    p, _, _ = problem()
    with pytest.raises(sf.ScorefnError, match="leave coupling out"):
        sf.draw(p, rewards, 2, coupling=sf.Independent())
