"""The optimal constant: unbiased, and of least variance."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import nn
from torch.distributions import Bernoulli, Normal

import scorefn as sf
from scorefn.reducers import cross_fitting, optimal_constant
from tests.oracles.expectations import ENTRIES, deviation
from tests.oracles.families import FAMILIES
from tests.oracles.plain import check_plain
from tests.oracles.settings import setting, settings
from tests.oracles.tolerances import EXACT, VISIBLE, near
from tests.oracles.toys import TOYS, values
from tests.reducers.doubles import doubles
from tests.reducers.optimal_constant_cases import DECISIONS, READERS, normals, refused, scored, state_features


@pytest.fixture
def probe(monkeypatch):
    """Fix the vector of signs: a function of the parameters to tensors of +-1."""

    def fix(signs):
        monkeypatch.setattr(optimal_constant, "_signs", signs)

    return fix


# ------------------------------------------------------------------------------------------------ unbiasedness


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("baseline", READERS)
@pytest.mark.parametrize("toy", TOYS)
def test_expected_gradient(toy, baseline, entry):
    """Every tuple of draws, in all layouts of blocks, groups and problems, with masks and off-policy."""
    for given in settings([toy], DECISIONS):
        assert deviation(given, "own", READERS[baseline](), entry) < EXACT, given


def test_expected_gradient_for_each_vector_of_signs(probe):
    """The probe is independent of the draws, so each of its values gives the exact gradient: 8 signs, K = 1."""
    for name, off_policy in product(["N=2", "N=3", "antithetic"], [False, True]):
        given = setting("single", name, off_policy)
        read = []
        for signs in product([-1.0, 1.0], repeat=3):
            probe(lambda parameters, signs=signs: [doubles(signs).expand_as(parameters[0])])
            assert deviation(given, "own", sf.OptimalConstant(), "surrogate") < EXACT
            read.append(sf.OptimalConstant()(given.draws.signal(), given.draws))
        if name == "N=3":  # the signs matter; where there is one other draw there is nothing to weigh
            assert (torch.stack(read) - read[0]).abs().max() > VISIBLE


def test_expected_gradient_for_each_vector_of_signs_of_two_decisions(probe):
    given = setting("coins", "N=2")
    for signs in product([-1.0, 1.0], repeat=3):
        probe(lambda parameters, signs=signs: [
            doubles(signs[:1] if parameter.numel() == 1 else signs[1:]).reshape(parameter.shape)
            for parameter in parameters
        ])  # fmt: skip
        for credit in ("Total()", "RewardToGo(1)", "Influence"):
            assert deviation(given, credit, sf.OptimalConstant(), "surrogate") < EXACT


@pytest.mark.parametrize("name", FAMILIES)
def test_plain_distributions(name):
    for N in range(2, FAMILIES[name].most + 1):
        for entry in ("surrogate", "dice", "expectation"):
            check_plain(FAMILIES[name], N, sf.OptimalConstant(), entry)


def including_itself(v, draws, *, across_groups=False):
    return v.sum(0, keepdim=True).expand(v.shape)


@pytest.mark.parametrize("baseline", READERS)
def test_a_fit_that_includes_the_own_draw_is_seen(baseline, monkeypatch):
    """Mutation: the sums run over all draws."""
    for module in (optimal_constant, cross_fitting):
        monkeypatch.setattr(module, "others", including_itself)
    given = setting("chain", "N=3")
    assert deviation(given, "own", READERS[baseline](), "surrogate") > VISIBLE


@pytest.mark.parametrize("baseline", READERS)
def test_a_fit_inside_the_own_block_is_seen(baseline):
    """Mutation: the block is not told to the baseline, only to the law of the draws."""
    given, reader = setting("chain", "antithetic"), READERS[baseline]()
    blind = type("Blind", (), {"unbiased": True, "__call__": lambda self, s, d: reader(s, replace(d, block=None))})()
    assert deviation(given, "own", blind, "surrogate") > VISIBLE


def test_features_that_see_the_decision_are_biased():
    given = setting("chain", "N=3")
    cheat = sf.RegressionBaseline(lambda draws: torch.stack([draws.x, draws.x], -1).double().unsqueeze(-1))
    assert deviation(given, "own", cheat, "surrogate") > VISIBLE


# ------------------------------------------------------------------------------------------------ the sums of others


@pytest.mark.parametrize("across_groups", [False, True])
def test_others_against_the_loop(across_groups):
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        n = int(torch.randint(2, 9, (), generator=generator))
        v = normals(seed, n, 2, 3)
        group, block = (torch.randint(-1, 3, (n,), generator=generator) for _ in range(2))
        group, block = (None if seed % 3 == 0 else group), (None if seed % 2 == 0 else block)
        draws = sf.Draws(v, v.clone().requires_grad_(), v, sf.Influence(torch.eye(3).bool()), group=group, block=block)
        ours = cross_fitting.others(v, draws, across_groups=across_groups)
        for i in range(n):
            keep = [
                j
                for j in range(n)
                if (j != i if block is None else block[j] != block[i])
                and (group is None or across_groups or group[j] == group[i])
            ]
            assert near(ours[i], v[keep].sum(0)), (seed, i)


def test_others_keep_their_digits_beside_a_large_own_term():
    v = torch.tensor([[1.0], [1e12], [2.0]])
    draws = sf.Draws(v, v.clone().requires_grad_(), v)
    assert cross_fitting.others(v, draws).flatten().tolist()[1] == 3.0
    for labels in ({"block": torch.tensor([4, 2, 4])}, {"group": torch.tensor([1, 1, 1])}):
        assert cross_fitting.others(v, replace(draws, **labels)).flatten().tolist()[1] == 3.0


def test_the_probe_is_made_of_random_signs_from_the_generator_of_torch():
    parameters = [torch.zeros(40, 2), torch.zeros(3, dtype=torch.float64, requires_grad=True)]
    torch.manual_seed(5)
    signs = optimal_constant._signs(parameters)
    assert [(v.shape, v.dtype) for v in signs] == [(p.shape, p.dtype) for p in parameters]
    assert all(set(v.flatten().tolist()) <= {-1.0, 1.0} and not v.requires_grad for v in signs)
    assert signs[0].sum().abs() < 45  # 5 standard deviations of 80 signs
    torch.manual_seed(5)
    assert torch.equal(optimal_constant._signs(parameters)[0], signs[0])


def test_the_weights_are_squared_scores(probe):
    """Against scores taken one by one."""
    v = [values(parameter.shape, 50) for parameter in setting("chain", "N=3").parameters[:2]]
    probe(lambda parameters: [v[0] if parameter.shape == v[0].shape else v[1] for parameter in parameters])
    given = setting("chain", "N=3")
    draws = given.draws
    signal = draws.signal(sf.RewardToGo())
    T = draws.log_prob.shape[1]
    entries = [torch.autograd.grad(entry, given.parameters[:2], retain_graph=True, materialize_grads=True)
               for entry in draws.log_prob[:, :6].flatten()]  # fmt: skip
    score = torch.stack([sum((g * u).sum() for g, u in zip(entry, v, strict=True)) for entry in entries])
    score = score.reshape(3, 6, 2)
    w, f = score.square(), signal[:, :6]
    total_w, total = w.sum(0) - w, (w * f).sum(0) - w * f
    plain = sf.LeaveOneOut()(signal, draws)[:, :6]
    truth = torch.where(total_w > 1e-12, total / total_w.clamp(min=1e-12), plain)
    ours = sf.OptimalConstant()(signal, draws)
    assert ours.shape == (3, T, 2)
    assert near(ours[:, :6], truth, 1e-9)


def test_one_signal_for_all_decisions_is_weighed_by_the_summed_score():
    theta = doubles([0.4, -0.3]).requires_grad_()
    x = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0], [0.0, 1.0]]).double()
    log_prob = Bernoulli(logits=theta.sum()).log_prob(x)  # both decisions share their parameters
    f = doubles([1.0, -2.0, 0.5, 3.0]).unsqueeze(-1)
    ours = sf.OptimalConstant()(f, scored(log_prob, f))
    joint = sf.OptimalConstant()(f, scored(log_prob.sum(-1, keepdim=True), f))
    assert ours.shape == (4, 1)
    assert near(ours, joint)


def test_normal_quadratic_has_the_printed_constant_and_variance():
    """f = x^2 under N(1, 1): b = m^2 + 3 s^2 = 4, where the variance is 14 (18 with E f, 30 with nothing)."""
    m = doubles(1.0).requires_grad_()
    x = Normal(1.0, 1.0).icdf((torch.arange(20000).double() + 0.5) / 20000)
    f = x.square()
    draws = scored(Normal(m, 1.0).log_prob(x).unsqueeze(-1), f.unsqueeze(-1))
    b = sf.OptimalConstant()(draws.signal(), draws)
    assert (b - 4).abs().max() < 0.03  # the tails that midpoints miss
    variance = ((f - b.squeeze(-1)) * (x - 1)).var()
    assert abs(float(variance) - 14) < 0.3
    assert float(((f - 2) * (x - 1)).var()) > 17.5


def chain(theta, size):
    """Trajectories that stay with probability theta for reward 1, else stop: how often they stayed."""
    return torch.distributions.Geometric(1 - theta.detach()).sample((size,))


def test_the_chain_has_the_printed_variance_of_full_returns():
    """At theta = .5, b = (1 + 2 theta)/(1 - theta) = 4 leaves the variance 4/(1 - theta)^4 = 64, of 192 without.

    200,000 draws; the standard error of b is .07 and that of the variance 1.3, taken six times (false alarm 1e-6).
    """
    theta = doubles(0.5).requires_grad_()
    stays = chain(theta, 200_000)
    log_prob = stays * theta.log() + (1 - theta).log()
    draws = scored(log_prob.unsqueeze(-1), stays.unsqueeze(-1))
    b = sf.OptimalConstant()(draws.signal(), draws)
    assert (b - 4).abs().max() < 0.42
    score = stays / 0.5 - 1 / 0.5
    assert abs(float(((stays - b.squeeze(-1)) * score).var()) - 64) < 8
    assert float((stays * score).var()) > 170


def test_the_chain_has_the_printed_variance_of_rewards_to_go():
    """At theta = .5, one b = (1 + theta)/(1 - theta) = 3 for all steps leaves 1/(1 - theta)^4 = 16, of 88 without.

    A constant for each step is V = 1 here, and leaves 48. 100,000 draws of at most 40 steps; the standard error of b
    is .05 and that of the variance 2 %, taken six times or more (false alarm 1e-6).
    """
    theta = doubles(0.5).requires_grad_()
    steps = torch.bernoulli(torch.full((100_000, 40), 0.5, dtype=torch.float64))
    alive = torch.cat([torch.ones(100_000, 1, dtype=torch.bool), steps.cumprod(1)[:, :-1].bool()], 1)
    log_prob = steps * theta.log() + (1 - steps) * (1 - theta).log()
    draws = sf.Draws(steps, log_prob, torch.where(alive, steps, 0.0), credit=sf.RewardToGo(), mask=alive)
    score = torch.where(alive, 4 * steps - 2, 0.0)
    for baseline, printed in ((sf.OptimalConstant(shared=True), 16), (sf.OptimalConstant(), 48), (None, 88)):
        b = 0.0 if baseline is None else baseline(draws.signal(), draws)
        if printed == 16:
            assert (b - 3).abs().max() < 0.3
        assert abs(float(((draws.signal() - b) * score).sum(-1).var()) - printed) < 0.2 * printed


def test_off_policy_the_constant_minimises_the_weighted_variance():
    """min_b E_b[(w f - w b)^2 s^2] by enumeration, against the constant of very many draws in the same proportions."""
    theta = doubles(0.8).requires_grad_()
    x = doubles([0.0] * 500 + [1.0] * 500)  # from a fair coin
    log_prob = Bernoulli(logits=theta).log_prob(x).unsqueeze(-1)
    f = (3 * x - 1).unsqueeze(-1)
    draws = scored(log_prob, f, behaviour_log_prob=torch.full_like(log_prob, 0.5).log())
    b = sf.OptimalConstant()(draws.signal(), draws)
    p = theta.detach().sigmoid()
    w, s = torch.stack([2 * (1 - p), 2 * p]), torch.stack([-p, 1 - p])
    values = doubles([-1.0, 2.0])
    truth = (w.square() * s.square() * values).sum() / (w.square() * s.square()).sum()
    assert (b - truth).abs().max() < 0.01
    spread = [float(((w * (values - c) * s).square()).sum()) for c in (truth - 0.1, truth, truth + 0.1)]
    assert spread[1] == min(spread)


def test_less_variance_than_leave_one_out_at_many_draws():
    """N = 100 draws of N(1, 1), f = x^2: 14/100 against 18/100 and a little."""
    generator = torch.Generator().manual_seed(0)
    x = 1 + torch.randn(100, 4000, generator=generator, dtype=torch.float64)
    m = torch.ones(4000, dtype=torch.float64, requires_grad=True)
    draws = sf.Draws(x, Normal(m, 1.0).log_prob(x).unsqueeze(-1), x.square().unsqueeze(-1))

    def variance(baseline):
        estimate = sf.surrogate(draws, baseline=baseline).mean(0).sum()
        return 100 * float(torch.autograd.grad(estimate, m, retain_graph=True)[0].var())

    # each has a relative standard error of (2 / 4000)^(1/2) = 2 %, and they are positively correlated
    assert variance(sf.OptimalConstant()) < 0.9 * variance(sf.LeaveOneOut())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_scores_it_is_leave_one_out(dtype):
    theta = torch.zeros(1, dtype=dtype, requires_grad=True)
    fx = torch.tensor([[1.0], [2.0], [6.0]], dtype=dtype)
    draws = scored(torch.ones(3, 1, dtype=dtype) * theta * 0.0, fx)
    assert torch.equal(sf.OptimalConstant()(fx, draws), sf.LeaveOneOut()(fx, draws))


def test_a_value_alone_needs_no_scores():
    p = Bernoulli(logits=torch.zeros(3, requires_grad=True))
    with torch.no_grad():
        value = sf.expectation(p, lambda x: x.sum(-1), 4, baseline=sf.OptimalConstant())
    assert not value.requires_grad


def test_the_gradient_can_still_be_taken_and_the_parameters_are_left_alone():
    net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))
    p = Bernoulli(logits=net(torch.ones(3, 2)).squeeze(-1))
    loss = sf.expectation(p, lambda x: x.sum(-1), 8, baseline=sf.OptimalConstant())
    assert all(parameter.grad is None for parameter in net.parameters())
    loss.backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_a_rare_draw_does_not_spoil_the_constant_in_single_precision():
    """One draw has 10^8 times the weight of the others: what it is compared with are the others, with all digits."""
    logit = torch.tensor(-9.2, requires_grad=True)
    x = torch.zeros(50)
    x[17] = 1.0
    f = torch.linspace(-1, 1, 50).unsqueeze(-1)
    draws = scored(Bernoulli(logits=logit).log_prob(x).unsqueeze(-1), f)
    b = sf.OptimalConstant()(f, draws)
    torch.testing.assert_close(b[17], torch.cat([f[:17], f[18:]]).mean(0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("baseline", [sf.OptimalConstant(), sf.RegressionBaseline(state_features)])
def test_one_block_is_refused(baseline):
    refused(baseline, setting("chain", "one block").draws, "two blocks")
    refused(baseline, setting("chain", "N=1").draws, "two blocks")


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad * 2


def test_what_cannot_be_differentiated_twice_is_refused():
    theta = torch.zeros(3, requires_grad=True)
    log_prob = Bernoulli(logits=Once.apply(theta)).log_prob(torch.ones(4, 3))
    refused(sf.OptimalConstant(), scored(log_prob, torch.randn(4, 1)), "twice")


def test_transforms_are_refused():
    def loss(theta):
        x = torch.tensor([[0.0], [1.0], [1.0]])
        draws = sf.Draws(x, Bernoulli(logits=theta).log_prob(x), x)
        return sf.surrogate(draws, baseline=sf.OptimalConstant()).mean()

    with pytest.raises(sf.ScorefnError, match=r"torch\.func"):
        torch.func.grad(loss)(torch.zeros(1))


@pytest.mark.parametrize("baseline", [sf.OptimalConstant(), sf.RegressionBaseline()])
def test_each_declares_what_it_is(baseline):
    assert baseline.unbiased is True
    assert baseline.fitted is True


def test_a_graph_that_was_freed_is_named():
    theta = torch.zeros(2, requires_grad=True)
    draws = sf.draw(Bernoulli(logits=theta.exp()), lambda x: x.sum(-1), 4)
    sf.surrogate(draws).mean().backward()
    with pytest.raises(sf.ScorefnError, match="a backward pass has freed its graph"):
        sf.surrogate(draws, baseline=sf.OptimalConstant())
