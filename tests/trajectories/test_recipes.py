"""Recipes: published formulas by plain loops, exact biases over the tuples of the token task, microbatches."""

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
    Sequence,
    SequenceMean,
    TokenMean,
    TokenSum,
    Truncated,
    WhitenedAdvantage,
    dapo,
    dr_grpo,
    grpo,
    kl_surrogate,
    objective,
    reinforce_plus_plus_baseline,
    rloo,
    sequence_draws,
)
from tests.oracles import near
from tests.trajectories import token_task as task

RECIPES = {
    "rloo": rloo,
    "reinforce++": reinforce_plus_plus_baseline,
    "grpo": grpo,
    "dr_grpo": lambda draws, **options: dr_grpo(draws, max_length=8, **options),
    "dapo": lambda draws, denominator=None, **options: dapo(
        draws, tokens=float(draws.mask.sum()) if denominator is None else denominator, **options
    ),
}
ADVANTAGES = {
    "rloo": LeaveOneOutAdvantage(),
    "reinforce++": WhitenedAdvantage(),
    "grpo": GroupStandardizedAdvantage(),
    "dr_grpo": GroupMeanAdvantage(),
    "dapo": GroupStandardizedAdvantage(),
}


class Batch:
    """Ragged groups out of order, one alone in its group, one group all equal; masks with holes; off-policy or not."""

    def __init__(self, off_policy, dtype=torch.float64, seed=0):
        generator = torch.Generator().manual_seed(seed)
        N, T = 12, 8
        self.group = torch.tensor([5, 9, 5, 9, 9, 2, 5, 7, 7, 9, 5, 7])  # 2 is alone
        self.reward = torch.randint(0, 4, (N,), generator=generator).to(dtype) / 3
        self.reward[self.group == 7] = 0.5
        self.reward[:2] = torch.tensor([1.0, 0.0], dtype=dtype)
        self.mask = torch.rand(N, T, generator=generator) < 0.7
        self.mask[:, 0] = True
        self.logp = (-torch.rand(N, T, generator=generator).to(dtype) - 0.5).requires_grad_()
        noise = 0.4 * torch.randn(N, T, generator=generator).to(dtype)
        self.behaviour = self.logp.detach() + noise if off_policy else None

    def draws(self):
        return sequence_draws(self.logp, self.reward, mask=self.mask, group=self.group, behaviour_logp=self.behaviour)

    # the published formulas, by plain loops over Python numbers -------------------------------------------------

    def others(self, i):
        return [j for j in range(12) if self.group[j] == self.group[i]]

    def group_mean(self, i):
        members = self.others(i)
        if len(members) == 1:
            return float(self.reward[i])
        return float(self.reward[i]) - sum(float(self.reward[j]) for j in members) / len(members)

    def leave_one_out(self, i):
        rest = [float(self.reward[j]) for j in self.others(i) if j != i]
        return float(self.reward[i]) - (sum(rest) / len(rest) if rest else 0.0)

    def standardized(self, i, epsilon):
        members = [float(self.reward[j]) for j in self.others(i)]
        if len(members) == 1:
            return float(self.reward[i])
        mean = sum(members) / len(members)
        spread = math.sqrt(sum((r - mean) ** 2 for r in members) / (len(members) - 1))
        return (float(self.reward[i]) - mean) / (spread + epsilon)

    def whitened(self, epsilon):
        every = [self.group_mean(i) for i in range(12) for t in range(8) if self.mask[i, t]]
        mean = sum(every) / len(every)
        variance = sum((a - mean) ** 2 for a in every) / (len(every) - 1)
        return [(self.group_mean(i) - mean) / math.sqrt(variance + epsilon) for i in range(12)]

    def tokens(self, i):
        return [t for t in range(8) if self.mask[i, t]]

    def ratio(self, i, t):
        if self.behaviour is None:
            return (self.logp[i, t] - self.logp[i, t].detach()).exp()
        return (self.logp[i, t] - self.behaviour[i, t]).exp()

    def clipped(self, i, t, advantage, low, high):
        ratio = self.ratio(i, t)
        return min(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)

    def published(self, name):
        rows = range(12)
        if name == "rloo":
            total = 0.0
            for i in rows:
                weight = 1.0
                for t in self.tokens(i):
                    weight = weight * self.ratio(i, t).detach()
                total = total + weight * self.leave_one_out(i) * sum(self.logp[i, t] for t in self.tokens(i))
            return total / 12
        if name == "grpo":
            return sum(
                sum(self.clipped(i, t, self.standardized(i, 1e-4), 0.2, 0.2) for t in self.tokens(i))
                / len(self.tokens(i))
                for i in rows
            ) / 12  # fmt: skip
        if name == "dr_grpo":
            return sum(self.clipped(i, t, self.group_mean(i), 0.2, 0.2) for i in rows for t in self.tokens(i)) / (
                12 * 8
            )
        if name == "dapo":
            every = [self.clipped(i, t, self.standardized(i, 1e-4), 0.2, 0.28) for i in rows for t in self.tokens(i)]
            return sum(every) / len(every)
        white = self.whitened(1e-8)
        return sum(self.clipped(i, t, white[i], 0.2, 0.2) for i in rows for t in self.tokens(i)) / 12


# --------------------------------------------------------------------------------------------------- published formulas


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


# ------------------------------------------------------------------------------------------------------- exact anchors


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
