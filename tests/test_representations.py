"""`repr` says how a part was made, or what a result is: in a few lines, without addresses and without long tensors."""

import importlib
import inspect
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.distributions import Bernoulli, Normal

import scorefn as sf
from scorefn import core, diagnostics, fisher, scale, search, trajectories
from scorefn.core.representation import brief

gymnasium = pytest.importorskip("gymnasium")

ROOMS = ["core", "diagnostics", "estimators", "fisher", "reducers", "scale", "search", "shaping", "trajectories"]
LOGITS = torch.zeros(3, requires_grad=True)
COIN = Bernoulli(logits=LOGITS)
LAYER = nn.Linear(4, 2)
ONES = torch.ones(2, 9)


def total(x):
    return x.sum(-1)


def sphere(x):
    return (x**2).sum(-1)


def executor():
    return ThreadPoolExecutor(1)


def estimate():
    return sf.expectation(COIN, total, 8)


def environment():
    return gymnasium.make_vec("CartPole-v1", num_envs=2, vectorization_mode="sync")


def policy():
    return trajectories.CategoricalPolicy(LAYER)


def tokens():
    present = torch.tensor([[True, True, False]]).expand(4, 3)
    return trajectories.sequence_draws(torch.full((4, 3), -1.0, requires_grad=True), torch.arange(4.0), mask=present)


def searched(strategy):
    strategy.tell(points := strategy.ask(), sphere(points))
    return strategy


def metered():
    with (meter := diagnostics.GradientMeter(LAYER, every=1)):
        LAYER(torch.ones(2, 4)).sum(-1).mean().backward()
    return meter.latest


def segment():
    return trajectories.SegmentDistribution(environment(), policy(), steps=3)


# How to make each, and what it says; None: no more than that it says something short.
MADE = {
    sf.Draws: (
        lambda: sf.draw(COIN, total, 100, coupling=sf.Antithetic()),
        "Draws(N=100, B=(), K=1, J=1, x=tensor [100, 3], on-policy, 50 blocks)",
    ),
    sf.Independent: (sf.Independent, "Independent()"),
    sf.LeaveOneOut: (sf.LeaveOneOut, "LeaveOneOut()"),
    sf.Total: (sf.Total, "Total()"),
    scale.World: (scale.World, "World()"),
    sf.AdaptiveRaoBlackwell: (sf.AdaptiveRaoBlackwell, "AdaptiveRaoBlackwell(0.95)"),
    sf.Antithetic: (sf.Antithetic, "Antithetic()"),
    sf.BlockConstants: (lambda: sf.BlockConstants([LOGITS]), "BlockConstants(<1 blocks of [3] numbers>, 0.95)"),
    sf.Constant: (lambda: sf.Constant(2.0), "Constant(b=2.0)"),
    sf.DeltaMethod: (
        lambda: sf.DeltaMethod(Normal(LOGITS, 1.0), total),
        "DeltaMethod(Normal(loc: torch.Size([3]), scale: torch.Size([3])), total, ridge=1e-06)",
    ),
    sf.Influence: (lambda: sf.Influence(torch.ones(3, 4).bool()), "Influence(mask=tensor [3, 4])"),
    sf.LinearControlVariate: (
        lambda: sf.LinearControlVariate(total, 1.5),
        "LinearControlVariate(total, 1.5, ridge=1e-06)",
    ),
    sf.MovingAverage: (lambda: sf.MovingAverage(0.5), "MovingAverage(0.5)"),
    sf.NaturalControlVariate: (
        lambda: sf.NaturalControlVariate(Bernoulli(logits=LOGITS)),
        "NaturalControlVariate(Bernoulli(logits: torch.Size([3])), capacity=1000, gate=0.1, ridge=0.001)",
    ),
    sf.OptimalConstant: (sf.OptimalConstant, "OptimalConstant(shared=False)"),
    sf.OrthogonalGaussian: (lambda: sf.OrthogonalGaussian(mirrored=True), "OrthogonalGaussian(mirrored=True)"),
    sf.RegressionBaseline: (
        lambda: sf.RegressionBaseline(total, ridge=0.1),
        "RegressionBaseline(features=total, ridge=0.1)",
    ),
    sf.RewardToGo: (
        lambda: sf.RewardToGo(discount=0.99, visitation_discount=False),
        "RewardToGo(discount=0.99, visitation_discount=False)",
    ),
    sf.Sobol: (sf.Sobol, "Sobol()"),
    sf.Stratified: (lambda: sf.Stratified(4), "Stratified(strata=4)"),
    sf.Systematic: (lambda: sf.Systematic(4), "Systematic(points=4)"),
    sf.ValueFunction: (
        lambda: sf.ValueFunction(LAYER, optimizer=torch.optim.SGD(LAYER.parameters())),
        "ValueFunction(Linear(in_features=4, out_features=2, bias=True), optimizer=SGD)",
    ),
    sf.ARMS: (lambda: sf.ARMS(4), "ARMS(4)"),
    sf.DisARM: (lambda: sf.DisARM(2), "DisARM(num_pairs=2)"),
    sf.DoubleControlVariate: (lambda: sf.DoubleControlVariate(4), "DoubleControlVariate(4, alpha=1.0)"),
    sf.Enumerate: (sf.Enumerate, "Enumerate()"),
    sf.LocalExpectation: (lambda: sf.LocalExpectation(2), "LocalExpectation(num_samples=2)"),
    sf.REBAR: (sf.REBAR, "REBAR(temperature=0.5, scale=1)"),
    sf.RELAX: (lambda: sf.RELAX(LAYER), "RELAX(Linear)"),
    sf.SumAndSample: (lambda: sf.SumAndSample(2), "SumAndSample(num_summed=2)"),
    sf.UnorderedSet: (lambda: sf.UnorderedSet(4), "UnorderedSet(num_samples=4)"),
    sf.FisherMatrix: (
        lambda: sf.fisher_information(COIN),
        "FisherMatrix(parameters={'logits': [0.0, 0.0, 0.0]}, batch_shape=torch.Size([3]))",
    ),
    sf.ConjugateGradients: (lambda: sf.ConjugateGradients(1e-3), "ConjugateGradients(tolerance=0.001)"),
    fisher.Scores: (lambda: fisher.Scores(LOGITS * 2, (LOGITS,), torch.ones(3)), "Scores([3, 3])"),
    sf.DenseSolve: (sf.DenseSolve, "DenseSolve()"),
    sf.Woodbury: (sf.Woodbury, "Woodbury()"),
    sf.CenteredRank: (sf.CenteredRank, "CenteredRank()"),
    sf.NESUtilities: (sf.NESUtilities, "NESUtilities()"),
    sf.Standardize: (sf.Standardize, "Standardize()"),
    scale.Checkpoint: (lambda: scale.Checkpoint("run.pt", every=2), None),
    scale.Workers: (lambda: scale.Workers(executor, attempts=1), "Workers(executor=executor, attempts=1)"),
    scale.WorkRecord: (lambda: scale.WorkRecord(0, 20, 2.0, 3.0, 2, 0, 0, 0, 0), None),
    scale.SeedRecord: (lambda: scale.SeedRecord(0, 20, 2.0, 3.0, 2, 0, 0, 0, 0), None),
    search.Arm: (lambda: search.Arm(10, 0.5), "Arm(popsize=10, sigma_factor=0.5)"),
    search.BIPOP: (search.BIPOP, "BIPOP()"),
    search.IPOP: (lambda: search.IPOP(3), "IPOP(3)"),
    search.Portfolio: (search.Portfolio, "Portfolio()"),
    search.BernoulliSearch: (
        lambda: search.BernoulliSearch(5, popsize=4),
        "BernoulliSearch(dimension=5, popsize=4, generation=0, evaluations=0, best_f=inf)",
    ),
    search.CategoricalSearch: (lambda: search.CategoricalSearch([3, 3]), None),
    search.ClipUp: (lambda: search.ClipUp([LOGITS], max_speed=0.1), None),
    search.CoordinateSearch: (lambda: search.CoordinateSearch([0.0, 1.0], 1.0), None),
    search.CSANES: (lambda: search.CSANES([0.0, 1.0], 1.0), None),
    search.DistributionSearch: (
        lambda: search.DistributionSearch(lambda: Normal(LOGITS, 1.0), [LOGITS], popsize=4, natural=True),
        None,
    ),
    search.Evaluator: (lambda: search.Evaluator(sphere, executor), "Evaluator(sphere)"),
    search.History: (lambda: search.minimize(sphere, [1.0], 1.0, maxfevals=30).history, None),
    search.IntegerSearch: (lambda: search.IntegerSearch([0], [9]), None),
    search.Limits: (lambda: search.Limits(ftarget=1e-8), "Limits(ftarget=1e-08)"),
    search.OpenAIES: (lambda: search.OpenAIES([0.0, 1.0], 1.0), None),
    search.PenalizedBounds: (lambda: search.PenalizedBounds(0.0), "PenalizedBounds(0.0, inf)"),
    search.PGPE: (lambda: search.PGPE([0.0, 1.0], 1.0), None),
    search.ProductSearch: (lambda: search.ProductSearch({"bits": search.BernoulliSearch(5)}), None),
    search.RankOneCSANES: (lambda: search.RankOneCSANES([0.0, 1.0], 1.0), None),
    search.ResampledBounds: (
        lambda: search.ResampledBounds([0.0, 1.0], attempts=9),
        "ResampledBounds([0.0, 1.0], inf, attempts=9)",
    ),
    search.SearchResult: (lambda: search.minimize(sphere, [1.0], 1.0, maxfevals=30), None),
    search.SeparableCSANES: (lambda: search.SeparableCSANES([0.0, 1.0], 1.0), None),
    search.SignalToNoise: (search.SignalToNoise, "SignalToNoise()"),
    search.SmoothBounds: (lambda: search.SmoothBounds(0.0, 1.0), "SmoothBounds(0.0, 1.0)"),
    search.SNES: (lambda: searched(search.SNES([0.0, 0.0], 1.0, popsize=4)), None),
    search.StrategyResult: (lambda: search.SNES([0.0, 1.0], 1.0).result, None),
    search.XNES: (lambda: search.XNES([0.0, 1.0], 1.0), None),
    trajectories.BernoulliPolicy: (lambda: trajectories.BernoulliPolicy(LAYER), None),
    trajectories.CategoricalPolicy: (policy, None),
    trajectories.GaussianPolicy: (lambda: trajectories.GaussianPolicy(LAYER, torch.zeros(2)), None),
    trajectories.MultiCategoricalPolicy: (lambda: trajectories.MultiCategoricalPolicy(LAYER, [2]), None),
    trajectories.RecurrentPolicy: (lambda: trajectories.RecurrentPolicy(nn.GRUCell(4, 4), policy()), None),
    trajectories.MultiCategorical: (lambda: trajectories.MultiCategorical([2, 3], torch.zeros(5)), None),
    trajectories.ObservationNormalization: (lambda: trajectories.ObservationNormalization(4), None),
    trajectories.Bias: (lambda: trajectories.rloo(tokens()).bias, "Bias()"),
    trajectories.Clip: (lambda: trajectories.Clip(0.0, 1.0), None),
    trajectories.Tanh: (lambda: trajectories.Tanh(0.0, 1.0), None),
    trajectories.Clipped: (lambda: trajectories.Clipped(0.2), "Clipped(low=0.2)"),
    trajectories.Geometric: (trajectories.Geometric, "Geometric()"),
    trajectories.GradientNoise: (lambda: trajectories.gradient_noise(LOGITS * torch.arange(3.0), LOGITS), None),
    trajectories.GroupMeanAdvantage: (trajectories.GroupMeanAdvantage, "GroupMeanAdvantage()"),
    trajectories.GroupStandardizedAdvantage: (
        lambda: trajectories.GroupStandardizedAdvantage(1e-8),
        "GroupStandardizedAdvantage(epsilon=1e-08)",
    ),
    trajectories.LeaveOneOutAdvantage: (trajectories.LeaveOneOutAdvantage, "LeaveOneOutAdvantage()"),
    trajectories.WhitenedAdvantage: (trajectories.WhitenedAdvantage, "WhitenedAdvantage()"),
    trajectories.Objective: (lambda: trajectories.rloo(tokens()), None),
    trajectories.PerDecision: (trajectories.PerDecision, "PerDecision()"),
    trajectories.PolicyChange: (
        lambda: trajectories.policy_change(tokens(), tokens().log_prob),
        "PolicyChange(kl=0.0, standard_error=0.0)",
    ),
    trajectories.Raw: (trajectories.Raw, "Raw()"),
    trajectories.Sequence: (trajectories.Sequence, "Sequence()"),
    trajectories.SequenceMean: (lambda: trajectories.SequenceMean(8), "SequenceMean(denominator=8)"),
    trajectories.Sequences: (lambda: tokens().x, "Sequences(reward=[0.0, 1.0, 2.0, 3.0], ref_log_prob=None)"),
    trajectories.TokenMean: (lambda: trajectories.TokenMean(20), "TokenMean(tokens=20)"),
    trajectories.TokenSum: (lambda: trajectories.TokenSum(5), "TokenSum(denominator=5)"),
    trajectories.Truncated: (lambda: trajectories.Truncated(2.0), "Truncated(cap=2.0)"),
    trajectories.TemporalDifference: (lambda: trajectories.TemporalDifference(LAYER, 0.9), None),
    trajectories.VTrace: (
        lambda: trajectories.vtrace(*[ONES] * 3, *[ONES.bool()] * 2, ONES, discount=0.9),
        "VTrace(targets=tensor [2, 9], advantages=tensor [2, 9])",
    ),
    trajectories.Trajectories: (
        lambda: trajectories.rollout(environment(), policy(), 2, max_steps=3),
        "Trajectories(observations=tensor [2, 3, 4], actions=tensor [2, 3], rewards=tensor [2, 3], terminated=tensor "
        "[2, 3], truncated=tensor [2, 3], mask=tensor [2, 3], next_observations=tensor [2, 3, 4], starts=tensor "
        "[2, 3])",
    ),
    trajectories.TrajectoryDistribution: (
        lambda: trajectories.TrajectoryDistribution(environment(), policy(), max_steps=3),
        "TrajectoryDistribution(SyncVectorEnv(CartPole-v1, num_envs=2), CategoricalPolicy, max_steps=3)",
    ),
    trajectories.SegmentDistribution: (
        segment,
        "SegmentDistribution(SyncVectorEnv(CartPole-v1, num_envs=2), CategoricalPolicy, steps=3)",
    ),
    trajectories.Streams: (
        lambda: segment().streams,
        "Streams(SyncVectorEnv(CartPole-v1, num_envs=2), CategoricalPolicy)",
    ),
    diagnostics.Allocation: (lambda: diagnostics.Allocation(4.0, 1.0, 1.0, 0.25), None),
    diagnostics.AuditReport: (lambda: diagnostics.audit(COIN, total, repeats=100), None),
    diagnostics.Candidate: (lambda: diagnostics.shortlist(COIN, total).candidates[0], None),
    diagnostics.Shortlist: (lambda: diagnostics.shortlist(COIN, total), None),
    diagnostics.Comparison: (lambda: diagnostics.compare({"a": estimate, "b": estimate}, LOGITS, repeats=4), None),
    diagnostics.Estimation: (lambda: diagnostics.Estimation(COIN, total, sf.Enumerate()), None),
    diagnostics.Finding: (lambda: diagnostics.Finding("name", "fact", "reason", "repair"), None),
    diagnostics.FixedSample: (lambda: diagnostics.FixedSample(200), "FixedSample(repeats=200)"),
    diagnostics.Hotelling: (lambda: diagnostics.Hotelling(200), "Hotelling(repeats=200)"),
    diagnostics.GradientMeter: (
        lambda: diagnostics.GradientMeter(LAYER),
        "GradientMeter(1 layers, every=20)",
    ),
    diagnostics.GradientMoments: (metered, None),
    diagnostics.GradientStatistics: (lambda: diagnostics.gradient_statistics(estimate, LOGITS, 4), None),
    diagnostics.NestedAllocation: (lambda: diagnostics.NestedAllocation((1.0, 8.0), (10.0, 1.0)), None),
    diagnostics.ProblemNoise: (
        lambda: diagnostics.ProblemNoise(torch.ones(9), torch.zeros(2)),
        "ProblemNoise(variance=tensor [9], excess=[0.0, 0.0])",
    ),
    diagnostics.Recommendation: (lambda: diagnostics.recommend(COIN, total, LOGITS, budget=400), None),
    diagnostics.SampleSize: (
        lambda: diagnostics.SampleSize(2.0, most=64),
        "SampleSize(num_samples=2, SNR nan of 2)",
    ),
    diagnostics.Sequential: (diagnostics.Sequential, "Sequential()"),
    diagnostics.SplitHalves: (
        lambda: diagnostics.split_halves(LOGITS.sum() * torch.ones(8), LOGITS),
        None,
    ),
    diagnostics.UnbiasedReport: (
        lambda: diagnostics.check_unbiased(
            estimate, diagnostics.exact_gradient(COIN, total, LOGITS), LOGITS, repeats=100
        ),
        None,
    ),
}
NOT_MADE = {
    core.Credit: "abstract",
    sf.FisherInformation: "abstract",
    search.Bounds: "abstract",
    search.Restarts: "abstract",
    search.Strategy: "abstract",
    scale.RayExecutor: "starts Ray",
}


def classes():
    for room in ROOMS:
        module = importlib.import_module(f"scorefn.{room}")
        for name in getattr(module, "__all__", ["CenteredRank", "NESUtilities", "Standardize"]):
            found = getattr(module, name)
            if inspect.isclass(found) and not issubclass(found, BaseException) and not is_contract(found):
                yield found


def is_contract(found):
    return getattr(found, "_is_protocol", False) or not found.__module__.startswith("scorefn.")


@pytest.mark.parametrize("kind", dict.fromkeys(classes()), ids=lambda kind: kind.__name__)
def test_it_says_what_it_is(kind):
    if kind.__module__.startswith("scorefn.posteriors") or kind in NOT_MADE:
        return
    make, expected = MADE[kind]
    said = repr(make())
    assert " object at 0x" not in said
    assert " at 0x" not in said
    assert "tensor(" not in said
    assert "array(" not in said
    assert kind.__name__ in said
    assert len(said) < 1500
    if expected is not None:
        assert said == expected


def test_a_strategy_says_how_far_it_is():
    strategy = search.SNES([3.0, 4.0], 1e-9, popsize=4, seed=0)
    strategy.tell(points := strategy.ask(), sphere(points))
    assert repr(strategy) == "SNES(dimension=2, popsize=4, generation=1, evaluations=4, best_f=25)"


def test_draws_say_what_is_not_plain():
    draws = tokens()
    assert repr(draws).endswith("on-policy, mask)")
    fields = {name: getattr(draws, name) for name in ("x", "log_prob", "fx")}
    again = sf.Draws(**fields, behaviour_log_prob=draws.log_prob.detach(), group=torch.zeros(4).long(), fitted=True)
    assert repr(again).endswith("off-policy, group, fitted)")
    assert "credit=RewardToGo(done=tensor [2, 3])" in repr(sf.draw(segment(), trajectories.rewards, 2))


def test_draws_can_be_shown_within_a_transform():
    seen = []

    def shown(logits):
        seen.append(repr(sf.draw(Bernoulli(logits=logits), total, 4, coupling=sf.Antithetic())))
        return logits.sum()

    torch.func.grad(shown)(torch.zeros(3))
    assert seen == ["Draws(N=4, B=(), K=1, J=1, x=tensor [4, 3], on-policy, block)"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (torch.zeros(2, 3), "tensor [2, 3]"),
        (torch.arange(6), "[0, 1, 2, 3, 4, 5]"),
        (torch.arange(7), "tensor [7]"),
        (torch.zeros(0), "[]"),
        (torch.tensor(1 / 3), "0.333333"),
        (torch.zeros(9).numpy(), "array [9]"),
        (math.pi, "3.14159"),
        (1e-6, "1e-06"),
        (math.inf, "inf"),
        (True, "True"),
        (total, "total"),
        (nn.Linear, "Linear"),
        (nn.Sequential(LAYER), "Sequential"),
        ({"a": torch.zeros(9)}, "{'a': tensor [9]}"),
        ((1.0,), "(1.0,)"),
        (list(range(9)), "[0, 1, 2, 3, 4, 5, ... 3 more]"),
        (object(), "object"),
        ("a text " * 50, repr("a text " * 50)),
    ],
)
def test_a_value_in_a_few_words(value, text):
    assert brief(value) == text
