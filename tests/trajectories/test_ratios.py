"""Ratios: which of them keep the expected gradient, by enumeration of the token task; and the formulas themselves."""

import itertools
import math

import pytest
import torch

import scorefn as sf
from scorefn.trajectories import (
    Clipped,
    Geometric,
    PerDecision,
    Raw,
    Sequence,
    Truncated,
    clip_fraction,
    effective_sample_size,
    ratio_surrogate,
)
from tests.oracles.tolerances import near
from tests.trajectories.token_task import context, doubles, log_prob, mask, policy, probability, tokens

LEVELS = [PerDecision(), Sequence(), Geometric()]
TRANSFORMS = [Raw(), Truncated(1.1), Clipped(0.2), Clipped(0.1, 0.3)]
LENGTH = mask.sum(-1, keepdim=True)


def token_rewards():
    """`[15, 3]`, known once the token is written; NaN where there is none."""
    return doubles(7, 3, seed=8)[context, tokens].where(mask, torch.nan)


def task(off_policy=True, fx=None, garbage=0.0):
    """All sequences as draws, and their probability under the behaviour."""
    theta, other = policy(0), policy(1).detach()
    behaviour = log_prob(other)
    fx = torch.ones(15, 1, dtype=torch.float64) if fx is None else fx
    draws = sf.Draws(
        None,
        log_prob(theta).where(mask, garbage),
        fx,
        behaviour_log_prob=behaviour.where(mask, garbage) if off_policy else None,
        mask=mask,
    )
    return theta, draws, probability(other if off_policy else theta).detach()


def gradient(value, theta):
    return torch.autograd.grad(value, theta, retain_graph=True)[0]


def truth(theta):
    """The gradient of the expected sum of rewards."""
    return gradient(probability(theta) @ token_rewards().nansum(-1), theta)


def to_go():
    """Reward from each token on, `[15, 3]`, NaN where there is none."""
    rewards = token_rewards().nan_to_num()
    return (rewards.flip(-1).cumsum(-1).flip(-1)).where(mask, torch.nan)


def expected(level, transform, advantage):
    theta, draws, weight = task()
    return gradient(weight @ ratio_surrogate(draws, advantage, level=level, transform=transform), theta), truth(theta)


# ------------------------------------------------------------------------------------------------------ expectations


@pytest.mark.parametrize("advantage", ["of each draw", "of each decision"])
@pytest.mark.parametrize("level", LEVELS, ids=repr)
@pytest.mark.parametrize("transform", TRANSFORMS, ids=repr)
def test_only_the_raw_ratio_of_the_sequence_keeps_the_gradient(level, transform, advantage):
    values = to_go() if advantage == "of each decision" else token_rewards().nansum(-1, keepdim=True)
    ours, right = expected(level, transform, values)
    gap = (ours - right).abs().max()
    if level.unbiased and transform.unbiased:
        assert gap < 1e-10
    else:
        assert gap > 1e-3


def test_the_exact_weights_of_single_decisions_are_those_of_the_core():
    theta, draws, weight = task(fx=token_rewards().nan_to_num())
    ours = gradient(weight @ sf.surrogate(draws, credit=sf.RewardToGo()), theta)
    assert near(ours, truth(theta))
    cumulative = PerDecision()(draws).detach().cumsum(-1).exp()
    assert near(draws.bound(sf.RewardToGo()).weighted().detach(), cumulative * draws.fx)
    assert near(Sequence()(draws).detach().exp() * draws.fx, draws.weighted().detach())  # Total


@pytest.mark.parametrize("level", LEVELS, ids=repr)
@pytest.mark.parametrize("transform", TRANSFORMS, ids=repr)
@pytest.mark.parametrize("given", [False, True])
def test_at_ratio_one_each_gradient_is_that_of_the_score_function(level, transform, given):
    theta, draws, _ = task(off_policy=False, garbage=torch.nan)
    if given:
        draws = sf.Draws(None, draws.log_prob, draws.fx, behaviour_log_prob=draws.log_prob.detach(), mask=mask)
    advantage = doubles(15, 3, seed=5).where(mask, torch.nan)
    ours = ratio_surrogate(draws, advantage, level=level, transform=transform)
    assert near(ours.detach(), advantage.nansum(-1))
    scores = (log_prob(theta) * advantage.nan_to_num()).sum(-1)
    for i in range(15):
        assert near(gradient(ours[i], theta), gradient(scores[i], theta))
    whole = ratio_surrogate(draws, doubles(15, 1, seed=6), level=level, transform=transform)
    share = LENGTH if isinstance(level, Geometric) else torch.ones_like(LENGTH)
    scores = log_prob(theta).sum(-1) * doubles(15, 1, seed=6).squeeze(-1) / share.squeeze(-1)
    for i in range(15):
        assert near(gradient(whole[i], theta), gradient(scores[i], theta))


def test_a_single_decision_has_one_ratio():
    logits = doubles(4, seed=1).requires_grad_()
    behaviour = doubles(4, seed=2).log_softmax(-1)
    fx = doubles(4, 1, seed=3)
    draws = sf.Draws(None, logits.log_softmax(-1)[:, None], fx, behaviour_log_prob=behaviour[:, None])
    right = gradient(logits.softmax(-1) @ fx.squeeze(-1), logits)
    for level in LEVELS:
        assert near(gradient(behaviour.exp() @ ratio_surrogate(draws, fx, level=level, transform=Raw()), logits), right)


# ----------------------------------------------------------------------------------------------------------- formulas


def test_levels():
    _, draws, _ = task(garbage=torch.nan)
    log_ratio = log_prob(policy(0)).detach() - log_prob(policy(1)).detach()
    assert near(PerDecision()(draws).detach(), log_ratio)
    assert near(Sequence()(draws).detach(), log_ratio.sum(-1, keepdim=True))
    assert near(Geometric()(draws).detach(), log_ratio.sum(-1, keepdim=True) / LENGTH)
    plain = sf.Draws(None, draws.log_prob, draws.fx, behaviour_log_prob=draws.behaviour_log_prob)
    assert near(Geometric()(plain).detach(), log_ratio.mean(-1, keepdim=True))


@pytest.mark.parametrize("level", LEVELS, ids=repr)
def test_the_gradient_of_a_ratio_is_the_ratio_times_the_score(level):
    theta, draws, _ = task()
    ratio = level(draws).exp()
    for i, k in itertools.product(range(15), range(ratio.shape[-1])):
        score = log_prob(theta)[i]
        share = {PerDecision: score[k], Sequence: score.sum(), Geometric: score.sum() / LENGTH[i, 0]}[type(level)]
        assert near(gradient(ratio[i, k], theta), ratio[i, k].detach() * gradient(share, theta))


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("ratio", [0.5, 0.8 - 1e-9, 0.8 + 1e-9, 1.0, 1.3 - 1e-9, 1.3 + 1e-9, 2.0])
def test_the_clip_case_by_case(ratio, sign):
    """From the rule, not the formula: no gradient once the ratio has gone where the advantage pushes it."""
    w = torch.tensor([[ratio]], dtype=torch.float64, requires_grad=True)
    advantage = torch.tensor([[1.7 * sign]], dtype=torch.float64)
    value = Clipped(0.2, 0.3)(w, advantage)
    if sign > 0:
        cut, right = ratio > 1.3, 1.7 * min(ratio, 1.3)
    else:
        cut, right = ratio < 0.8, -1.7 * max(ratio, 0.8)
    assert abs(float(value.detach()) - right) < 1e-12
    (slope,) = torch.autograd.grad(value, w)
    assert float(slope) == (0.0 if cut else pytest.approx(1.7 * sign, abs=1e-12))
    assert float(value.detach()) <= float((w * advantage).detach()) + 1e-12  # a pessimistic bound


@pytest.mark.parametrize("off_policy", [False, True])
def test_the_clipped_objective_of_the_token_task_by_hand(off_policy):
    theta, draws, _ = task(off_policy)
    advantage = doubles(15, 3, seed=5)
    ours = ratio_surrogate(draws, advantage)
    origin = log_prob(policy(1) if off_policy else theta).detach()
    right = 0.0
    for i, k in itertools.product(range(15), range(3)):
        if mask[i, k]:
            ratio, a = (log_prob(theta)[i, k] - origin[i, k]).exp(), advantage[i, k]
            inside = ratio < 1.2 if a > 0 else ratio > 0.8
            right = right + (ratio if inside else (1.2 if a > 0 else 0.8) + 0 * ratio) * a
    assert near(ours.sum().detach(), right.detach())
    assert near(gradient(ours.sum(), theta), gradient(right, theta))


def test_truncation_stops_the_gradient_beyond_the_cap():
    w = torch.tensor([0.5, 1.5, 3.0], requires_grad=True)
    value = Truncated(2.0)(w, torch.tensor([1.0, -1.0, 5.0]))
    assert value.tolist() == [0.5, -1.5, 10.0]
    assert torch.autograd.grad(value.sum(), w)[0].tolist() == [1.0, -1.0, 0.0]


def test_no_gradient_reaches_the_advantage_and_problems_are_apart():
    _, draws, _ = task()
    advantage = doubles(15, 1, seed=5).requires_grad_()
    total = ratio_surrogate(draws, advantage, level=Sequence()).sum()
    assert torch.autograd.grad(total, advantage, allow_unused=True)[0] is None
    wide = sf.Draws(
        None,
        draws.log_prob[:, None].expand(15, 2, 3),
        draws.fx[:, None].expand(15, 2, 1),
        behaviour_log_prob=draws.behaviour_log_prob[:, None].expand(15, 2, 3),
        mask=mask[:, None].expand(15, 2, 3),
    )
    for level in LEVELS:
        both = ratio_surrogate(wide, doubles(15, 2, 3, seed=5), level=level)
        assert both.shape == (15, 2)
        alone = ratio_surrogate(draws, doubles(15, 2, 3, seed=5)[:, 1], level=level)
        assert near(both[:, 1].detach(), alone.detach())


def test_a_draw_without_decisions_counts_for_nothing():
    theta = torch.zeros(2, 2, requires_grad=True)
    present = torch.tensor([[True, True], [False, False]])
    draws = sf.Draws(None, theta * 1.0, torch.ones(2, 1), mask=present)
    for level in LEVELS:
        for advantage in (torch.full((2, 1), 2.0), torch.full((2, 2), 2.0).where(present, torch.nan)):
            found = ratio_surrogate(draws, advantage, level=level, transform=Raw())
            assert found[1] == 0
            assert torch.autograd.grad(found.sum(), theta, retain_graph=True)[0][1].tolist() == [0.0, 0.0]


# -------------------------------------------------------------------------------------------------------- diagnostics


def test_the_effective_sample_size():
    log_ratio = doubles(7, seed=1)
    w = log_ratio.exp()
    assert near(effective_sample_size(log_ratio), w.sum() ** 2 / (w**2).sum())
    assert near(
        effective_sample_size(log_ratio + 1000.0), effective_sample_size(log_ratio)
    )  # in logarithms nothing overflows
    assert near(effective_sample_size(torch.zeros(5)), torch.tensor(5.0))
    assert near(effective_sample_size(torch.tensor([0.0, -800.0])), torch.tensor(1.0))
    several = torch.stack([log_ratio, 2 * log_ratio], -1)
    counts = torch.rand(7, 2, generator=torch.Generator().manual_seed(0)) > 0.4
    found = effective_sample_size(several.where(counts, torch.nan), counts)
    for b in range(2):
        assert near(found[b], effective_sample_size(several[:, b][counts[:, b]]))
    assert effective_sample_size(log_ratio, torch.zeros(7, dtype=torch.bool)) == 0
    _, draws, _ = task()
    assert 1 < float(effective_sample_size(Sequence()(draws).squeeze(-1))) < 15


def test_the_clip_fraction():
    log_ratio = torch.tensor([[0.5, 1.0, 1.25], [0.85, 1.5, 9.0]]).log()
    counts = torch.tensor([[True, True, True], [True, True, False]])
    assert clip_fraction(log_ratio, Clipped(0.2)) == pytest.approx(4 / 6)
    assert clip_fraction(log_ratio, Clipped(0.2), counts) == pytest.approx(3 / 5)
    assert clip_fraction(log_ratio, Clipped(0.6, 0.3), counts) == pytest.approx(1 / 5)
    assert clip_fraction(log_ratio, Truncated(1.2), counts) == pytest.approx(2 / 5)
    assert clip_fraction(log_ratio, Raw()) == 0
    assert clip_fraction(log_ratio, Clipped(0.2), torch.zeros_like(counts)) == 0


# -------------------------------------------------------------------------------------------- declarations, refusals


def test_what_is_declared():
    assert [level.unbiased for level in LEVELS] == [False, True, False]
    assert [transform.unbiased for transform in TRANSFORMS] == [True, False, False, False]
    assert Truncated(math.inf).unbiased
    assert all(part.bias.endswith(".") for part in (*LEVELS, *TRANSFORMS))
    assert "[0.9, 1.3]" in Clipped(0.1, 0.3).bias
    assert "1.1 times" in Truncated(1.1).bias


def test_refusals():
    _, draws, _ = task()
    with pytest.raises(sf.ShapeError, match=r"advantage has shape \(15,\).*\(15, 3\).*\(15, 1\)"):
        ratio_surrogate(draws, torch.zeros(15))
    far = sf.Draws(None, draws.log_prob, draws.fx, behaviour_log_prob=draws.behaviour_log_prob - 1000.0, mask=mask)
    with pytest.raises(sf.NonFiniteError, match="importance weight"):
        ratio_surrogate(far, torch.zeros(15, 3, dtype=torch.float64))
    for wrong in (0.0, -1.0, 0.5, math.nan, "x"):
        with pytest.raises(sf.ScorefnError, match=f"cap must be a number of at least 1, but it is {wrong!r}"):
            Truncated(wrong)
    for wrong in (-0.1, 1.1, math.nan):
        with pytest.raises(sf.ScorefnError, match=rf"low must lie in \[0, 1\], but it is {wrong}"):
            Clipped(wrong)
    for wrong in ("x", None):
        with pytest.raises(sf.ScorefnError, match=f"low must be a number, but it is {wrong!r}"):
            Clipped(wrong)
    with pytest.raises(sf.ScorefnError, match="high must be a number, but it is 'x'"):
        Clipped(0.2, "x")
    for wrong in (-0.1, math.nan):
        with pytest.raises(sf.ScorefnError, match=f"high must be at least 0, but it is {wrong}"):
            Clipped(0.2, wrong)
    for call in (
        lambda m: effective_sample_size(torch.zeros(3, 2), m),
        lambda m: clip_fraction(torch.zeros(3, 2), Raw(), m),
    ):
        with pytest.raises(sf.ShapeError, match=r"mask has shape \(3,\), but log_ratio has \(3, 2\)"):
            call(torch.ones(3, dtype=torch.bool))


@pytest.mark.parametrize("transform", [*TRANSFORMS, Truncated(1.0), Clipped(0.0)], ids=repr)
@pytest.mark.parametrize("level", [PerDecision(), Sequence(), Geometric()], ids=repr)
def test_on_policy_no_transform_changes_the_gradient(level, transform):
    torch.manual_seed(0)
    log_prob = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    draws = sf.Draws(None, log_prob, torch.zeros(5, 1, dtype=torch.float64))
    for size in (3, 1):
        advantage = torch.randn(5, size, dtype=torch.float64)
        found = torch.autograd.grad(ratio_surrogate(draws, advantage, level=level, transform=transform).sum(), log_prob)
        share = 3 if isinstance(level, Geometric) and size == 1 else 1
        assert near(found[0], advantage.expand(5, 3) / share)
