"""Recipes for sequence models are the published formulas."""

import math
from dataclasses import replace

import pytest
import torch

import scorefn as sf
from scorefn.trajectories import (
    GroupMeanAdvantage,
    GroupStandardizedAdvantage,
    LeaveOneOutAdvantage,
    Sequence,
    TokenSum,
    Truncated,
    WhitenedAdvantage,
    dapo,
    dr_grpo,
    grpo,
    kl_surrogate,
    objective,
    rloo,
    sequence_draws,
)
from tests.oracles.tolerances import near
from tests.trajectories.recipe_cases import ADVANTAGES, RECIPES, Batch


@pytest.mark.parametrize("off_policy", [False, True])
@pytest.mark.parametrize("name", RECIPES)
def test_each_recipe_is_the_published_formula(name, off_policy):
    batch = Batch(off_policy)
    ours = RECIPES[name](batch.draws())
    (gradient,) = torch.autograd.grad(ours.value, batch.logp)
    published = batch.published(name)
    (truth,) = torch.autograd.grad(published, batch.logp)
    assert near(gradient, truth)
    assert gradient.norm() > 0.01
    assert (gradient[~batch.mask] == 0).all()
    assert near(ours.per_sequence.sum(0), ours.value)
    if name != "rloo":  # whose published value is a log-probability
        assert near(ours.value, published)


def test_the_epsilon_is_that_of_the_trainer():
    batch = Batch(False)
    for epsilon in (1e-4, 1e-6):
        advantage = GroupStandardizedAdvantage(epsilon)(batch.draws())
        assert near(
            advantage[:, 0], torch.tensor([batch.standardized(i, epsilon) for i in range(12)], dtype=torch.float64)
        )
    population = GroupStandardizedAdvantage(0.0, correction=0)(batch.draws())[batch.group == 5]
    assert near(population.square().mean(), torch.tensor(1.0).double())


def test_what_rounding_leaves_of_equal_returns_is_not_blown_up():
    logp = torch.zeros(7, 1, requires_grad=True)
    draws = sequence_draws(logp, [0.1] * 7)
    assert draws.fx.sum() / 7 != draws.fx[0]
    for advantage in (
        GroupMeanAdvantage(),
        GroupStandardizedAdvantage(1e-6),
        GroupStandardizedAdvantage(0.0),
        WhitenedAdvantage(epsilon=0.0),
    ):
        assert advantage(draws).tolist() == [[0.0]] * 7


def test_a_ratio_of_the_whole_sequence_is_clipped_with_all_its_tokens():
    batch = Batch(True)
    draws = batch.draws()
    result = objective(draws, GroupMeanAdvantage(), TokenSum(), level=Sequence(), transform=Truncated(1.1))
    ratio = (draws.log_prob - draws.behaviour_log_prob).sum(-1).exp()
    clipped = (ratio > 1.1) & (GroupMeanAdvantage()(draws)[:, 0] != 0)
    assert 0 < int(clipped.sum()) < 12
    share = batch.mask[clipped].sum() / batch.mask.sum()
    assert result.clip_fraction == pytest.approx(float(share))


@pytest.mark.parametrize("name", RECIPES)
def test_half_precision_counts_and_averages_in_single(name):
    """Inputs, ratio, advantage and gradient are rounded once each, to eps/2."""
    single, half = Batch(True, torch.float32), Batch(True, torch.bfloat16)
    half.logp = single.logp.detach().bfloat16().requires_grad_()
    (ours,) = torch.autograd.grad(RECIPES[name](half.draws()).value, half.logp)
    (truth,) = torch.autograd.grad(RECIPES[name](single.draws()).value, single.logp)
    assert ours.dtype == torch.bfloat16
    assert (ours - truth).norm() < 2 * torch.finfo(torch.bfloat16).eps * truth.norm()


def test_the_counts():
    for off_policy in (False, True):
        result = grpo(Batch(off_policy).draws())
        assert (result.degenerate_groups, result.singleton_groups) == (1, 1)
        if off_policy:
            assert 1 < float(result.effective_sample_size) < 12
            assert 0 < result.clip_fraction < 1
        else:
            assert float(result.effective_sample_size) == 12
            assert result.clip_fraction == 0
    assert rloo(Batch(True).draws()).clip_fraction == 0


def test_the_clip_fraction_is_that_of_tokens_without_gradient():
    batch = Batch(True)
    result = grpo(batch.draws())
    (gradient,) = torch.autograd.grad(result.value, batch.logp)
    counted = batch.mask & (ADVANTAGES["grpo"](batch.draws()) != 0)
    silenced = (counted & (gradient == 0)).sum() / batch.mask.sum()
    assert abs(result.clip_fraction - float(silenced)) < 1e-7


def test_a_sequence_alone_keeps_its_return():
    logp = torch.zeros(1, 2, requires_grad=True)
    for name, recipe in RECIPES.items():
        if name != "reinforce++":
            result = recipe(sequence_draws(logp, [3.0], mask=torch.ones(1, 2, dtype=torch.bool)))
            (gradient,) = torch.autograd.grad(result.value, logp)
            assert (gradient > 0).all(), name
            assert (result.degenerate_groups, result.singleton_groups) == (0, 1)


def test_an_advantage_per_token_is_reward_to_go_less_the_others():
    logp = torch.zeros(2, 2, requires_grad=True)
    draws = sequence_draws(logp, torch.tensor([[1.0, 2.0], [0.0, 5.0]]))
    assert LeaveOneOutAdvantage()(draws).tolist() == [[-2.0, -3.0], [2.0, 3.0]]
    assert GroupMeanAdvantage()(draws).tolist() == [[-1.0], [1.0]]


# -------------------------------------------------------------------------------------------------------- microbatches


@pytest.mark.parametrize("parts", [[12], [5, 7], [1] * 12, [2, 3, 7]])
@pytest.mark.parametrize("off_policy", [False, True])
@pytest.mark.parametrize("name", RECIPES)
def test_microbatches_add_up(name, off_policy, parts):
    batch = Batch(off_policy, dtype=torch.float32)
    whole = batch.draws()
    denominator = float(whole.mask.sum()) if name == "dapo" else float(len(whole))
    result = RECIPES[name](whole, denominator=denominator)
    (truth,) = torch.autograd.grad(result.value, batch.logp, retain_graph=True)
    with torch.no_grad():
        advantage = ADVANTAGES[name](whole)  # once, on the whole batch
    total, start = 0.0, 0
    for size in parts:
        part = slice(start, start + size)
        value = RECIPES[name](whole[part], denominator=denominator, given=advantage[part]).value
        total, start = total + torch.autograd.grad(value, batch.logp, retain_graph=True)[0], start + size
    assert (total - truth).abs().max() <= 1e-6
    assert truth.abs().max() > 1e-3


def test_a_constant_baseline_adds_up_likewise():
    batch = Batch(False, dtype=torch.float32)
    whole = batch.draws()
    baseline = sf.LeaveOneOut()(whole.signal(), whole)
    (truth,) = torch.autograd.grad(rloo(whole).value, batch.logp, retain_graph=True)
    parts = [slice(0, 5), slice(5, 12)]
    value = sum(sf.surrogate(whole[p], baseline=sf.Constant(baseline[p])).sum() / 12 for p in parts)
    (gradient,) = torch.autograd.grad(value, batch.logp)
    assert (gradient - truth).abs().max() <= 1e-6


def test_the_kl_stands_beside_the_objective():
    batch = Batch(False)
    ref = batch.logp.detach() - 0.1
    draws = sequence_draws(batch.logp, batch.reward, mask=batch.mask, group=batch.group, ref_logp=ref, kl_weight=0.0)
    (grpo(draws).value - 0.1 * kl_surrogate(draws).mean()).backward()
    assert batch.logp.grad.isfinite().all()


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda draws: rloo(draws, denominator=0.0), sf.ScorefnError, "denominator must be a positive number.*0.0"),
        (lambda draws: rloo(draws, denominator=float("nan")), sf.ScorefnError, "denominator must be a positive"),
        (lambda draws: dr_grpo(draws, max_length=0), sf.ScorefnError, "max_length must be a positive number"),
        (lambda draws: dapo(draws, tokens=-1.0), sf.ScorefnError, "tokens must be a positive number"),
        (lambda draws: grpo(draws, epsilon=-1.0), sf.ScorefnError, "epsilon must be a number of at least 0"),
        (lambda draws: WhitenedAdvantage(correction=2), sf.ScorefnError, "correction must be 1.*but it is 2"),
        (lambda draws: grpo(draws, clip=2.0), sf.ScorefnError, "low must lie in"),
        (lambda draws: grpo(draws, given=torch.zeros(12)), sf.ShapeError, r"given has shape \(12,\).*given\[a:b\]"),
        (lambda draws: grpo(draws[:3], given=torch.zeros(12, 1)), sf.ShapeError, r"given has shape \(12, 1\)"),
        (lambda draws: grpo(draws, given=torch.full((12, 1), torch.nan)), sf.NonFiniteError, "given is nan"),
    ],
)
def test_refusals(make, error, words):
    with pytest.raises(error, match=words):
        make(Batch(False).draws())


def test_an_objective_is_frozen():
    result = rloo(Batch(False).draws())
    with pytest.raises(AttributeError):
        result.value = 0
    assert replace(result, clip_fraction=1.0).clip_fraction == 1.0


def test_counts_of_tokens_that_are_no_counts_are_refused():
    draws = Batch(False).draws()
    for tokens in (torch.tensor(0.0), torch.tensor(math.nan), 0, "x"):
        with pytest.raises(sf.ScorefnError, match="tokens must be a positive number, but it is"):
            dapo(draws, tokens=tokens)
    with pytest.raises(sf.ShapeError, match=r"tokens has shape \(1,\), but .* of problems \[\*B\] = \(\)"):
        dapo(draws, tokens=torch.tensor([0.0]))
    two = sf.Draws(None, torch.zeros(4, 2, 3, requires_grad=True), torch.randn(4, 2, 1))
    assert dapo(two, tokens=torch.tensor([3.0, 5.0])).value.shape == (2,)
    with pytest.raises(sf.ScorefnError, match="tokens must be a positive number, but it is 0.0"):
        dapo(two, tokens=torch.tensor([3.0, 0.0]))
