"""What each recipe does to the gradient, exactly on a token task."""

import math
from dataclasses import replace

import pytest
import torch

import scorefn as sf
from scorefn.trajectories import (
    Bias,
    Geometric,
    GroupMeanAdvantage,
    GroupStandardizedAdvantage,
    LeaveOneOutAdvantage,
    SequenceMean,
    TokenMean,
    TokenSum,
    WhitenedAdvantage,
    dapo,
    dr_grpo,
    grpo,
    objective,
    rloo,
    sequence_draws,
)
from tests.oracles.tolerances import near
from tests.trajectories import token_task as task
from tests.trajectories.recipe_cases import Batch


@pytest.fixture(scope="module", params=[2, 4])
def token_task(request):
    theta, reward, K = task.policy(0), task.binary_reward(), request.param
    draws, weight = task.tuples(theta, reward, K)
    truth = task.gradient((task.probability(theta) * reward).sum(), theta)
    success = float((task.probability(theta).detach() * reward).sum())

    def expected(result):
        return task.gradient((weight * result.value).sum(), theta)

    return theta, reward, K, draws, expected, truth, success


def test_leave_one_out_is_exact(token_task):
    _, _, K, draws, expected, truth, _ = token_task
    result = rloo(draws)
    assert result.bias == Bias(1.0)
    assert near(expected(result), truth, 1e-10)
    assert result.value.shape == (15**K,)


def test_leave_one_out_is_exact_off_policy():
    theta, reward, behaviour = task.policy(0), task.binary_reward(), task.policy(1).detach()
    draws, weight = task.tuples(theta, reward, 2, behaviour=behaviour)
    truth = task.gradient((task.probability(theta) * reward).sum(), theta)
    result = rloo(draws)
    assert result.bias.unbiased
    assert near(task.gradient((weight * result.value).sum(), theta), truth, 1e-10)
    clipped = dr_grpo(draws, max_length=3)
    assert clipped.bias.scale is None
    assert "whose ratio has left [0.8, 1.2]" in str(clipped.bias)
    assert task.best_scale(task.gradient((weight * clipped.value).sum(), theta), truth)[1] > 1e-2


def test_leave_one_out_is_exact_off_policy_with_a_reward_per_token():
    theta, behaviour = task.policy(0), task.policy(1).detach()
    table = task.doubles(7, 3, seed=5)[task.context, task.tokens]
    value = torch.where(task.mask, table, 0.0)
    draws, weight = task.tuples(theta, task.binary_reward(), 2, behaviour=behaviour)
    choice = task.coordinates(15, 15).T
    draws = replace(draws, fx=value[choice], credit=sf.RewardToGo())
    truth = task.gradient((task.probability(theta) * value.sum(-1)).sum(), theta)
    assert near(task.gradient((weight * rloo(draws).value).sum(), theta), truth, 1e-10)


def test_leave_one_out_is_exact_with_the_kl_in_the_reward():
    theta, reference, reward = task.policy(0), task.policy(2).detach(), task.binary_reward()
    pairs = task.coordinates(15, 15)
    weight, each = task.probability(theta).detach()[pairs].prod(-1), pairs.flatten()
    draws = sequence_draws(
        task.log_prob(theta)[each], reward[each], mask=task.mask[each],
        group=torch.arange(225).repeat_interleave(2), ref_logp=task.log_prob(reference)[each], kl_weight=0.3,
    )  # fmt: skip
    p = task.probability(theta)
    divergence = (p * (task.log_prob(theta) - task.log_prob(reference)).sum(-1)).sum()
    truth = task.gradient((p * reward).sum() - 0.3 * divergence, theta)
    result = rloo(draws, denominator=2)
    estimate = (weight * result.per_sequence.reshape(225, 2).sum(-1)).sum()
    assert near(task.gradient(estimate, theta), truth, 1e-10)


def test_the_group_mean_shrinks_by_a_known_scale(token_task):
    _, _, K, draws, expected, truth, _ = token_task
    result = objective(draws, GroupMeanAdvantage(), TokenSum())
    assert result.bias == Bias((K - 1) / K)
    assert near(expected(result), (K - 1) / K * truth, 1e-10)


def test_dr_grpo_has_the_direction_and_a_known_scale(token_task):
    _, _, K, draws, expected, truth, _ = token_task
    result = dr_grpo(draws, max_length=3)
    assert result.bias == Bias((K - 1) / K)
    assert near(expected(result), (K - 1) / K / 3 * truth, 1e-10)
    assert f"{(K - 1) / K / 3:.3f}" == {2: "0.167", 4: "0.250"}[K]


def test_the_spread_of_one_prompt_scales_the_gradient(token_task):
    """Binary: by sqrt((K - 1)/K^3) E sqrt(s (K - s)) / (p (1 - p)), s successes; the direction is exact."""
    _, _, K, draws, expected, truth, p = token_task
    result = objective(draws, GroupStandardizedAdvantage(0.0), TokenSum())
    spread = sum(math.comb(K, s) * p**s * (1 - p) ** (K - s) * math.sqrt(s * (K - s)) for s in range(K + 1))
    scale = math.sqrt((K - 1) / K**3) * spread / (p * (1 - p))
    assert near(expected(result), scale * truth, 1e-10)
    assert result.bias.scale is None  # other prompts, other scales
    assert (f"{scale:.3f}" if K == 2 else f"{scale:.2f}") == {2: "0.707", 4: "1.40"}[K]


def test_the_spread_weighs_prompts_by_their_difficulty():
    """A prompt of success rate .05 against one of .5, relative to the gradient: 1.00, 1.06, 1.33, 1.69, 2.19."""

    def weight(p, K):
        spread = sum(math.comb(K, s) * p**s * (1 - p) ** (K - s) * math.sqrt(s * (K - s)) for s in range(K + 1))
        return spread / (p * (1 - p))

    relative = [weight(0.05, K) / weight(0.5, K) for K in (2, 4, 8, 16, 64)]
    assert [f"{r:.2f}" for r in relative] == ["1.00", "1.06", "1.33", "1.69", "2.19"]
    logit = torch.tensor([-math.log(19.0), 0.0], dtype=torch.float64, requires_grad=True)  # success .05 and .5
    choice = task.coordinates(2, 2, 2, 2).T  # 4 draws of each prompt, all tuples
    outcome = torch.stack([choice, choice], 1).double().reshape(8, 16)  # two groups that stand side by side
    prompt = torch.arange(8) % 2
    log_prob = torch.where(outcome > 0, torch.nn.functional.logsigmoid(logit[prompt])[:, None],
                           torch.nn.functional.logsigmoid(-logit[prompt])[:, None]).unsqueeze(-1)  # fmt: skip
    draws = sf.Draws(None, log_prob, outcome.unsqueeze(-1), group=prompt)
    result = objective(draws, GroupStandardizedAdvantage(0.0), TokenSum())
    for index in (0, 1):
        p = torch.sigmoid(logit.detach())[index]
        law = p ** choice.sum(0) * (1 - p) ** (4 - choice.sum(0))
        (gradient,) = torch.autograd.grad((law * result.value).sum(), logit, retain_graph=True)
        scale = math.sqrt(3 / 64) * weight(float(p), 4)
        assert near(gradient[index], scale * p * (1 - p) / 2, 1e-10)


MEASURED = {}


def test_lengths_and_whitening_bend_the_gradient(token_task):
    _, _, K, draws, expected, truth, _ = token_task
    tokens = draws.mask.sum((0, -1))
    results = {
        "1/length": objective(draws, LeaveOneOutAdvantage(), SequenceMean()),
        "token mean": objective(draws, LeaveOneOutAdvantage(), TokenMean(tokens)),
        "token whitening": objective(draws, WhitenedAdvantage(), TokenSum()),
        "grpo": grpo(draws),
        "dapo": dapo(draws, tokens=tokens),
    }
    for name, result in results.items():
        assert result.bias.scale is None, name
        assert str(result.bias).startswith("biased: "), name
        gradient = expected(result)
        scale, rest = task.best_scale(gradient, truth)
        MEASURED[name, K] = (task.cosine(gradient, truth), scale, rest)
        assert rest > 1e-2, name
        assert task.cosine(gradient, truth) < 1 - 1e-4, name
    if K == 4:  # the length of each sequence bends as much as ever, the number of tokens less and less
        assert abs(MEASURED["1/length", 2][2] - MEASURED["1/length", 4][2]) < 1e-10
        assert MEASURED["token mean", 4][2] < 0.7 * MEASURED["token mean", 2][2]
        assert MEASURED["token whitening", 4][2] < MEASURED["token whitening", 2][2]


def test_a_constant_instead_of_the_number_of_tokens_keeps_the_gradient(token_task):
    _, _, K, draws, expected, truth, _ = token_task
    result = objective(draws, LeaveOneOutAdvantage(), TokenSum(3.0 * K))
    assert result.bias.unbiased
    assert near(expected(result), truth / 3, 1e-10)


def test_groups_of_other_sizes_are_no_known_scale():
    draws = Batch(False).draws()
    assert objective(draws, GroupMeanAdvantage(), TokenSum()).bias.scale is None
    assert objective(draws, LeaveOneOutAdvantage(), TokenSum()).bias.unbiased


def test_a_part_of_the_batch_does_not_declare_the_bias_of_the_whole():
    whole = Batch(False).draws()
    part = rloo(whole[:5], denominator=12, given=LeaveOneOutAdvantage()(whole)[:5])
    assert "the advantage was given" in str(part.bias)


def test_geometric_ratios_are_biased_even_on_policy():
    assert "root of the exact weight" in str(
        objective(Batch(False).draws(), LeaveOneOutAdvantage(), TokenSum(), level=Geometric()).bias
    )


def test_the_bias_in_words():
    assert str(Bias()) == "unbiased"
    assert str(Bias(0.75)) == "unbiased up to the known scale 0.75"
    assert str(Bias(0.5) * Bias(None, ("of this",)) * Bias(None, ("of that",))) == "biased: of this; of that"
    assert Bias(0.5) * Bias(0.5) == Bias(0.25)
