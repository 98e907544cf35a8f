"""Meters against loops over single draws, enumerations of all N-tuples, and closed forms."""

import importlib
import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Bernoulli, Beta, Categorical, Independent, Normal, TransformedDistribution
from torch.distributions.transforms import TanhTransform

import scorefn as sf
from scorefn.trajectories import (
    explained_variance,
    gradient_noise,
    mean_entropy,
    mean_kl_divergence,
    per_draw,
    policy_change,
    read_meters,
    split_halves,
)
from tests.trajectories.corridor import SEQUENCES, Scripted, corridors

pytestmark = pytest.mark.usefixtures("float64")

N, T = 6, 4


def by_hand(surrogate, params, block=None):
    """Gradient of the mean and its variance from one backward pass for each draw."""
    params, draws = list(params), len(surrogate)
    each = []
    for value in surrogate.reshape(draws, -1).sum(1):
        found = torch.autograd.grad(value, params, retain_graph=True, allow_unused=True)
        each.append(
            torch.cat([(torch.zeros_like(q) if g is None else g).flatten() for q, g in zip(params, found, strict=True)])
        )
    each = torch.stack(each)
    labels = list(range(draws)) if block is None else block.tolist()
    mean, M = each.mean(0), len(set(labels))
    residuals = [sum(g - mean for g, b in zip(each, labels, strict=True) if b == label) for label in set(labels)]
    return mean, torch.stack(residuals).square().sum(0) * M / (M - 1) / draws**2


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors])


def charged(log_prob):
    return (log_prob * torch.randn(N, T)).sum(-1)


def network(*sizes, bias=True):
    layers = [m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b, bias=bias), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


def one_decision():
    net = network(3, 5, 2)
    return (Categorical(logits=net(torch.randn(N, 3))).log_prob(torch.ones(N)) * torch.randn(N)), net.parameters()


def steps():
    net = network(3, 5, 2)
    return charged(Categorical(logits=net(torch.randn(N, T, 3))).log_prob(torch.ones(N, T))), net.parameters()


def steps_without_bias():
    net = network(3, 5, 2, bias=False)
    return charged(Categorical(logits=net(torch.randn(N, T, 3))).log_prob(torch.ones(N, T))), net.parameters()


def present_rows_in_any_order():
    net, rows = network(3, 5, 2), torch.randperm(N * T)[:15]
    scored = Categorical(logits=net(torch.randn(15, 3))).log_prob(torch.ones(15))
    return charged(torch.zeros(N * T).index_put((rows,), scored).reshape(N, T)), net.parameters()


def unrolled():
    """The same layers at each step: a recurrent policy."""
    cell, head, state = nn.Linear(5, 2), nn.Linear(2, 2), torch.zeros(N, 2)
    scored = []
    for x in torch.randn(T, N, 3):
        state = cell(torch.cat([x, state], -1)).tanh()
        scored.append(Categorical(logits=head(state)).log_prob(torch.ones(N)))
    return charged(torch.stack(scored, -1)), [*cell.parameters(), *head.parameters()]


FAST = [one_decision, steps, steps_without_bias, present_rows_in_any_order, unrolled]


def gaussian():
    net, log_scale = network(3, 5, 2), torch.zeros(2, requires_grad=True)
    policy = Independent(Normal(net(torch.randn(N, T, 3)), log_scale.exp()), 1)
    return charged(policy.log_prob(torch.randn(N, T, 2))), [*net.parameters(), log_scale]


def rows_of_several_draws():
    """Each row holds two draws."""
    net = network(3, 5, 2)
    return net(torch.randn(N // 2, 3)).sin().flatten() * torch.randn(N), net.parameters()


def normalized_over_draws():
    net = network(3, 5, 2)
    hidden = net[0](torch.randn(N, 3))
    return net[2]((hidden - hidden.mean(0)) / hidden.std(0)).sin().sum(-1), net.parameters()


def tied():
    """One weight in two layers, and elsewhere."""
    layer = nn.Linear(3, 3)
    return layer(layer(torch.randn(N, 3)).tanh()).sin().sum(-1) * layer.weight.sum(), layer.parameters()


def transposed():
    weight = torch.randn(3, 2, requires_grad=True)
    return torch.addmm(torch.zeros(2), torch.randn(N, 3), weight, alpha=2).sin().sum(-1), [weight]


def scaled_addmm():
    layer = nn.Linear(3, 2)
    return torch.addmm(layer.bias, torch.randn(N, 3), layer.weight.T, alpha=2).sin().sum(-1), layer.parameters()


def strided():
    net = network(3, 5, 2)
    return charged(net(torch.randn(T, N, 3).transpose(0, 1)).sin().sum(-1)), net.parameters()


def unused():
    net = network(3, 5, 2)
    return net(torch.randn(N, 3)).sin().sum(-1), [*net.parameters(), torch.ones(2, requires_grad=True)]


def no_network():
    mean = torch.randn(3, requires_grad=True)
    return Normal(mean, 1.0).log_prob(torch.randn(N, 3)), [mean]  # [N, *B]


SLOW = [
    gaussian,
    rows_of_several_draws,
    normalized_over_draws,
    tied,
    transposed,
    scaled_addmm,
    strided,
    unused,
    no_network,
]
BLOCKS = [None, [0, 1, 0, 1, 2, 2], [7, 3, 3, 3, 3, 3], [-1, 4, 4, 9, 8, 9]]


class TestGradientNoise:
    @pytest.mark.parametrize("block", BLOCKS)
    @pytest.mark.parametrize("case", FAST + SLOW)
    def test_is_that_of_single_draws(self, case, block):
        surrogate, params = case()
        params, block = list(params), None if block is None else torch.tensor(block)
        mean, variance = by_hand(surrogate, params, block)
        noise = gradient_noise(surrogate, params, block=block)
        assert [v.shape for v in noise.variance] == [q.shape for q in params] == [g.shape for g in noise.mean]
        assert torch.allclose(flat(noise.mean), mean, rtol=0, atol=1e-12)
        assert torch.allclose(flat(noise.variance), variance, rtol=0, atol=1e-12 * float(variance.max()))
        signal = max(float(mean.square().sum() - variance.sum()), 0.0)
        assert noise.total_variance == pytest.approx(float(variance.sum()), rel=1e-12)
        assert noise.signal_to_noise == pytest.approx(signal / float(variance.sum()), rel=1e-9)
        assert noise.num_blocks == (N if block is None else len(set(block.tolist())))

    @pytest.mark.parametrize(("case", "passes"), [*[(case, 2) for case in FAST], (gaussian, 2 + N), (unused, 2 + N)])
    def test_passes(self, monkeypatch, case, passes):
        calls, original = [], per_draw.gradients
        monkeypatch.setattr(per_draw, "gradients", lambda *a: calls.append(1) or original(*a))
        gradient_noise(*case())
        assert len(calls) == passes

    def test_what_is_not_linear_is_differentiated_alone(self, monkeypatch):
        asked, original = [], per_draw.gradients
        monkeypatch.setattr(per_draw, "gradients", lambda v, q, *a: asked.append(len(q)) or original(v, q, *a))
        gradient_noise(*gaussian())
        assert asked == [5, 4] + [1] * N

    def test_chunks(self, monkeypatch):
        surrogate, params = steps()
        params = list(params)
        whole = gradient_noise(surrogate, params)
        monkeypatch.setattr(per_draw, "_ELEMENTS", 100)
        assert torch.allclose(flat(gradient_noise(surrogate, params).variance), flat(whole.variance), rtol=1e-13)

    def test_single_precision_of_many_draws(self):
        """The marks still tell 5000 draws apart."""
        net = network(3, 5, 2).float()
        x = torch.randn(5000, 3, dtype=torch.float32)
        surrogate, params = net(x).sin().sum(-1), list(net.parameters())
        calls, original = [], per_draw.gradients
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(per_draw, "gradients", lambda *a: calls.append(1) or original(*a))
            noise = gradient_noise(surrogate, params)
        assert len(calls) == 2
        net.double()
        single = torch.func.grad(lambda q, row: torch.func.functional_call(net, q, (row,)).sin().sum())
        each = torch.func.vmap(single, (None, 0))(dict(net.named_parameters()), x.double())
        for found, gradients in zip(noise.variance, each.values(), strict=True):
            assert torch.allclose(found.double(), gradients.var(0) / 5000, rtol=1e-5, atol=0)

    def test_leaves_graph_generator_and_gradients_alone(self):
        surrogate, params = steps()
        params, state = list(params), torch.get_rng_state()
        gradient_noise(surrogate, params)
        assert torch.equal(torch.get_rng_state(), state)
        assert all(q.grad is None for q in params)
        surrogate.mean().backward()

    def test_draws_of_an_environment(self):
        policy = Scripted(SEQUENCES)
        measure = sf.trajectories.TrajectoryDistribution(corridors(16), policy)
        draws = sf.draw(measure, sf.trajectories.rewards, 16)
        surrogate = sf.surrogate(draws)
        _, variance = by_hand(surrogate, policy.parameters())
        noise = gradient_noise(surrogate, policy.parameters())
        assert torch.allclose(flat(noise.variance), variance, rtol=1e-10, atol=1e-12)

    def test_without_noise(self):
        theta = torch.ones(2, requires_grad=True)
        certain = gradient_noise((theta * torch.ones(4, 2)), theta)
        assert (certain.total_variance, certain.signal_to_noise, certain.noise_scale) == (0.0, float("inf"), 0.0)
        nothing = gradient_noise((theta * torch.zeros(4, 2)), theta)
        assert nothing.signal_to_noise != nothing.signal_to_noise

    def test_noise_scale(self):
        """So many draws have an estimated signal-to-noise ratio of 1."""
        theta = torch.ones((), requires_grad=True)
        noise = gradient_noise(theta * torch.tensor([1.0, 3.0]), theta)  # mean 2, variance of the mean 1
        assert (noise.signal_to_noise, noise.noise_scale) == pytest.approx((3.0, 2 / 3))


def enumerated(p, f, num_samples, baseline=None, coupled=False):
    """Expected gradient, its variance and the expected meters of a Bernoulli's logit, over all N-tuples."""
    logit = torch.tensor(p).logit().requires_grad_()
    first = second = expected = products = 0.0
    for x in itertools.product([0.0, 1.0], repeat=num_samples // 2 if coupled else num_samples):
        weight = float(Bernoulli(probs=p).log_prob(torch.tensor(x)).sum().exp())
        x = torch.tensor([y for y in x for _ in range(2)] if coupled else x)
        draws = sf.Draws(
            x,
            Bernoulli(logits=logit).log_prob(x).unsqueeze(-1),
            f(x).unsqueeze(-1),
            block=torch.arange(num_samples) // 2 if coupled else None,
        )
        surrogate = sf.surrogate(draws, baseline=baseline)
        noise = gradient_noise(surrogate, logit, block=draws.block)
        gradient = float(noise.mean[0])
        first, second = first + weight * gradient, second + weight * gradient**2
        expected += weight * noise.total_variance
        if num_samples % 2 == 0:
            one, two = (
                torch.autograd.grad(s.mean(), logit, retain_graph=True)[0] for s in (surrogate[::2], surrogate[1::2])
            )
            products += weight * float(one * two)
    return first, second - first**2, expected, products


class TestAnchors:
    @pytest.mark.parametrize(("p", "variance"), [(0.5, 0.03125), (0.3, 0.05145), (0.1, 0.03645)])
    def test_bernoulli_without_baseline(self, p, variance):
        gradient, truth, expected, products = enumerated(p, lambda x: x, 2)
        assert gradient == pytest.approx(p * (1 - p), abs=1e-14)
        assert truth == pytest.approx(variance, abs=1e-14)
        assert expected == pytest.approx(variance, abs=1e-14)
        assert products == pytest.approx(gradient**2, abs=1e-14)

    @pytest.mark.parametrize("num_samples", [2, 3, 4])
    @pytest.mark.parametrize("p", [0.5, 0.3])
    def test_leave_one_out_understates_by_a_known_amount(self, p, num_samples):
        gradient, truth, expected, products = enumerated(p, lambda x: 2 * x + 1, num_samples, sf.LeaveOneOut())
        assert gradient == pytest.approx(2 * p * (1 - p), abs=1e-14)
        assert expected == pytest.approx(truth - gradient**2 / (num_samples - 1) ** 2, abs=1e-14)
        if num_samples == 2:
            assert truth == pytest.approx({0.5: 0.0625, 0.3: 0.0609}[p] * 4, abs=1e-14)
        if num_samples == 4:
            assert products == pytest.approx(gradient**2 * (1 + 1 / 9), abs=1e-14)

    @pytest.mark.parametrize("num_samples", [4, 6])
    def test_blocks_of_coupled_draws(self, num_samples):
        _, truth, expected, _ = enumerated(0.3, lambda x: 2 * x + 1, num_samples, coupled=True)
        assert expected == pytest.approx(truth, abs=1e-14)

    @pytest.mark.parametrize(("b", "variance"), [(0.0, 30.0), (2.0, 18.0), (4.0, 14.0)])
    def test_normal(self, b, variance):
        """Quadrature over all pairs of draws; x^2 under Normal(1, 1)."""
        grid, weights = hermite(7)
        mean, expected = torch.ones((), requires_grad=True), 0.0
        for (x, u), (y, v) in itertools.product(zip(grid, weights, strict=True), repeat=2):
            z = torch.stack([x, y]) + 1
            surrogate = (z.square() - b) * Normal(mean, 1.0).log_prob(z)
            expected += float(u * v) * gradient_noise(surrogate, mean).total_variance
        assert 2 * expected == pytest.approx(variance, rel=1e-12)


def hermite(count):
    nodes, weights = np.polynomial.hermite_e.hermegauss(count)
    return torch.tensor(nodes), torch.tensor(weights / weights.sum())


class TestSplitHalves:
    @pytest.mark.parametrize("block", BLOCKS)
    def test_by_hand(self, block):
        surrogate, params = gaussian()
        labels = list(range(N)) if block is None else block
        rank = sorted(set(labels))
        first = torch.tensor([rank.index(label) % 2 == 0 for label in labels])
        halves = [
            flat(torch.autograd.grad(s.mean(), params, retain_graph=True))
            for s in (surrogate[first], surrogate[~first])
        ]
        share = float(first.double().mean())
        cosine = float(torch.cosine_similarity(*halves, dim=0))
        snr = max(float(halves[0] @ halves[1]), 0) / (
            share * (1 - share) * float((halves[0] - halves[1]).square().sum())
        )
        block = None if block is None else torch.tensor(block)
        gradient = torch.autograd.grad(surrogate.mean(), params, retain_graph=True)
        for found in (
            split_halves(surrogate, params, block=block),
            split_halves(surrogate, params, block=block, gradient=gradient),
            split_halves((surrogate[first], surrogate[~first]), params),
        ):
            assert found == pytest.approx((cosine, snr), rel=1e-10)

    def test_passes(self, monkeypatch):
        surrogate, params = gaussian()
        gradient = torch.autograd.grad(surrogate.mean(), params, retain_graph=True)
        calls, original = [], per_draw.gradients
        monkeypatch.setattr(
            importlib.import_module("scorefn.diagnostics.halves"),
            "gradients",
            lambda *a: calls.append(1) or original(*a),
        )
        split_halves(surrogate, params)
        split_halves(surrogate, params, gradient=gradient)
        assert len(calls) == 3

    def test_equal_lengths_follow_from_the_cosine(self):
        theta = torch.zeros(2, requires_grad=True)
        found = split_halves(torch.tensor([[1.0, 0.0], [0.6, 0.8]]) @ theta, theta)
        assert found == pytest.approx((0.6, 2 * 0.6 / 0.4))

    def test_degenerate(self):
        theta = torch.zeros(2, requires_grad=True)
        found = split_halves(torch.tensor([[1.0, 0.0], [1.0, 0.0]]) @ theta, theta)
        assert found == (1.0, float("inf"))
        assert split_halves(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]) @ theta, theta) == (-1.0, 0.0)
        assert all(v != v for v in split_halves(torch.zeros(2, 2) @ theta, theta))


class TestExplainedVariance:
    def test_by_hand(self):
        signal, baseline = torch.tensor([[1.0, 2.0], [3.0, 6.0]]), torch.tensor([[1.0], [4.0]])
        assert explained_variance(signal, signal) == 1.0
        assert explained_variance(signal, torch.full((2, 2), 3.0)) == 0.0
        assert explained_variance(signal, baseline) == pytest.approx(1 - 6 / 14)
        assert explained_variance(signal, signal + 1) == pytest.approx(1 - 4 / 14)

    def test_mask(self):
        signal, mask = torch.tensor([[1.0, float("nan")], [3.0, 6.0]]), torch.tensor([[True, False], [True, True]])
        assert explained_variance(signal, torch.zeros(2, 1), mask) == pytest.approx(1 - 46 / (46 - 100 / 3))

    def test_constant_signal(self):
        found = explained_variance(torch.full((7,), 0.1, dtype=torch.float32), torch.zeros(7))
        assert found != found


class TestEntropy:
    def test_closed_form(self):
        logits = torch.randn(3, 4, 5)
        mask = torch.rand(3, 4) < 0.7
        by_step = -(logits.log_softmax(-1) * logits.softmax(-1)).sum(-1)
        assert mean_entropy(Categorical(logits=logits)) == pytest.approx(float(by_step.mean()), rel=1e-14)
        assert mean_entropy(Categorical(logits=logits), mask) == pytest.approx(float(by_step[mask].mean()), rel=1e-14)


class TestDivergence:
    def test_closed_form(self):
        m, s = torch.randn(2, 3, 4, 2), torch.rand(2, 3, 4, 2) + 0.5
        mask = torch.rand(3, 4) < 0.7
        by_step = ((s[1] / s[0]).log() + (s[0] ** 2 + (m[0] - m[1]) ** 2) / (2 * s[1] ** 2) - 0.5).sum(-1)
        previous, policy = (Independent(Normal(m[i], s[i]), 1) for i in range(2))
        assert mean_kl_divergence(previous, policy) == pytest.approx(float(by_step.mean()), rel=1e-12)
        assert mean_kl_divergence(previous, policy, mask) == pytest.approx(float(by_step[mask].mean()), rel=1e-12)

    def test_excluded_outcomes(self):
        previous, policy = Categorical(probs=torch.tensor([0.5, 0.5])), Categorical(probs=torch.tensor([1.0, 0.0]))
        assert mean_kl_divergence(previous, policy) == float("inf")


OLD = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
NEW = torch.tensor([0.4, 0.4, 0.2], dtype=torch.float64)


def drawn(old, **fields):
    return sf.Draws(torch.zeros(len(old)), old.clone().requires_grad_(), old.new_zeros(len(old), 1), **fields)


class TestPolicyChange:
    def test_expectation_and_standard_error_by_enumeration(self):
        truth = float((OLD * (OLD / NEW).log()).sum())
        first = second = error = 0.0
        for x in itertools.product(range(3), repeat=3):
            x = torch.tensor(x)
            weight = float(OLD[x].prod())
            found = policy_change(drawn(OLD[x].log().unsqueeze(-1)), NEW[x].log().unsqueeze(-1))
            first, second = first + weight * found.kl, second + weight * found.kl**2
            error += weight * found.standard_error**2
        assert first == pytest.approx(truth, abs=1e-14)
        assert error == pytest.approx(second - first**2, abs=1e-14)

    def test_steps_masks_and_blocks(self):
        old, new, mask = torch.randn(4, 3), torch.randn(4, 3), torch.rand(4, 3) < 0.6
        mask[:, 0] = True
        block = torch.tensor([0, 1, 1, 2])
        draws = drawn(old.where(mask, torch.nan), mask=mask, block=block)
        found = policy_change(draws, new.where(mask, torch.nan))
        k3 = ((new - old).exp() - 1 - (new - old)).where(mask, 0.0)
        kl = float(k3.sum() / mask.sum())
        residuals = [(k3 - kl * mask)[block == b].sum() for b in range(3)]
        assert found.kl == pytest.approx(kl, rel=1e-12)
        assert found.standard_error == pytest.approx(float((1.5 * sum(r**2 for r in residuals)).sqrt() / mask.sum()))

    def test_is_from_what_was_sampled(self):
        old, new, behaviour = torch.randn(3, 4, 1).unbind(0)
        draws = drawn(old, behaviour_log_prob=behaviour)
        assert policy_change(draws, new) == policy_change(drawn(behaviour), new)
        assert policy_change(draws, behaviour) == (0.0, 0.0)

    def test_one_draw_has_no_standard_error(self):
        found = policy_change(drawn(torch.zeros(1, 3)), torch.ones(1, 3))
        assert found.kl == pytest.approx(torch.e - 2)
        assert found.standard_error != found.standard_error

    def test_is_exact_for_a_small_change_in_single_precision(self):
        old = torch.zeros(2, 1, dtype=torch.float32)
        assert policy_change(drawn(old), old + 1e-4).kl == pytest.approx(0.5e-8, rel=1e-4)


class TestMeters:
    def test_are_the_meters(self):
        net = network(3, 5, 2)
        p = Categorical(logits=net(torch.randn(N, T, 3)))
        x, mask = p.sample(), torch.rand(N, T) < 0.8
        mask[:, 0] = True
        block, values = torch.arange(N) // 2, torch.randn(N, T)
        draws = sf.Draws(x, p.log_prob(x), values, credit=sf.RewardToGo(), mask=mask, block=block)
        baseline = sf.LeaveOneOut()(draws.signal(), draws)
        surrogate, params = sf.surrogate(draws, baseline=sf.Constant(baseline)), list(net.parameters())
        found = read_meters(surrogate, params, draws, baseline=baseline)
        halves = split_halves(surrogate, params, block=block)
        assert found == {
            "gradient cosine": halves.cosine,
            "gradient signal-to-noise": halves.signal_to_noise,
            "entropy": pytest.approx(-float(p.log_prob(x)[mask].detach().mean())),
            "baseline R2": explained_variance(draws.signal(), baseline, mask),
        }
        gradient = torch.autograd.grad(surrogate.mean(), params, retain_graph=True)
        assert read_meters(surrogate, params, draws, gradient=gradient)["gradient cosine"] == pytest.approx(
            halves.cosine
        )

    def test_off_policy_has_no_entropy(self):
        theta = torch.zeros(4, 1, requires_grad=True)
        draws = sf.Draws(
            torch.zeros(4), theta * torch.ones(4, 1), torch.randn(4, 1), behaviour_log_prob=torch.zeros(4, 1)
        )
        assert set(read_meters(sf.surrogate(draws), theta, draws)) == {"gradient cosine", "gradient signal-to-noise"}

    def test_one_step_problems(self):
        """The same meters for variational inference and search: any surrogate will do."""
        mean = torch.zeros(3, requires_grad=True)
        draws = sf.draw(Independent(Normal(mean, 1.0), 1), lambda x: x.square().sum(-1), 8)
        assert len(read_meters(sf.surrogate(draws), mean, draws, baseline=torch.zeros(8, 1))) == 4


THETA = torch.zeros(4, dtype=torch.float64, requires_grad=True)
VALUES = THETA * torch.arange(4.0)


def freed():
    surrogate, params = steps()
    surrogate.sum().backward()
    return surrogate, list(params)


REFUSED = [
    (lambda: gradient_noise(VALUES.sum(), THETA), "is a scalar, but one value per draw"),
    (lambda: gradient_noise(VALUES.detach(), THETA), "does not require grad, so it has no gradient"),
    (lambda: gradient_noise(VALUES, []), "no parameters to differentiate"),
    (lambda: gradient_noise(VALUES, [THETA, torch.zeros(2)]), r"Parameters \[1\] do not require grad"),
    (lambda: gradient_noise(VALUES[:1], THETA), r"There is 1 independent block of draws \(1 draws\)"),
    (lambda: gradient_noise(VALUES, THETA, block=torch.zeros(4, dtype=torch.long)), "1 independent block"),
    (
        lambda: gradient_noise(VALUES, THETA, block=torch.zeros(3, dtype=torch.long)),
        r"of shape \(3,\) on cpu, but for 4",
    ),
    (lambda: gradient_noise(VALUES, THETA, block=torch.zeros(4)), "block is torch.float"),
    (lambda: gradient_noise(VALUES * torch.nan, THETA), "gradient of some draws is NaN or infinite"),
    (lambda: gradient_noise(*freed()), "an earlier backward pass has freed it"),
    (lambda: split_halves(*freed()), "an earlier backward pass has freed it"),
    (lambda: split_halves(VALUES[:1], THETA), "1 independent block"),
    (lambda: split_halves(VALUES * torch.inf, THETA), "gradient of some draws is NaN or infinite"),
    (lambda: split_halves((VALUES, VALUES), THETA, gradient=[THETA]), "Two surrogates are two halves already"),
    (lambda: split_halves((VALUES, VALUES), THETA, block=torch.arange(4)), "Two surrogates are two halves already"),
    (
        lambda: split_halves(VALUES, THETA, gradient=[torch.zeros(3)]),
        r"gradient has shapes \[\(3,\)\], but params \[\(4",
    ),
    (
        lambda: read_meters(VALUES, THETA, drawn(torch.zeros(3, 1))),
        r"surrogate has shape \(4,\), but there are 3 draws",
    ),
    (lambda: explained_variance(torch.zeros(3, 2), torch.zeros(3)), r"baseline has shape \(3,\), but beside a signal"),
    (
        lambda: explained_variance(torch.zeros(3, 2), torch.zeros(3, 2), torch.ones(3) > 0),
        "one bool per value is needed",
    ),
    (lambda: explained_variance(torch.zeros(3), torch.zeros(3), torch.ones(3)), "mask is torch.float"),
    (lambda: explained_variance(torch.zeros(3), torch.zeros(3), torch.ones(3) < 0), "All of signal is masked"),
    (lambda: explained_variance(torch.zeros(3), torch.full((3,), torch.nan)), "baseline is nan in 3 of 3 present"),
    (lambda: explained_variance(torch.full((3,), torch.inf), torch.zeros(3)), "signal is inf in 3 of 3"),
    (
        lambda: mean_entropy(TransformedDistribution(Normal(torch.zeros(2), 1.0), TanhTransform())),
        "TransformedDistribution has no entropy in closed form",
    ),
    (lambda: mean_entropy(Normal(torch.zeros(2), 1.0), torch.ones(3) > 0), "one bool per value is needed"),
    (
        lambda: mean_entropy(Normal(torch.zeros(2), torch.tensor([0.0, 1.0]), validate_args=False)),
        "entropy is -inf in 1 of 2 present decisions",
    ),
    (
        lambda: mean_kl_divergence(Normal(torch.zeros(3), 1.0), Normal(torch.zeros(2, 3), 1.0)),
        r"previous has batch and event shapes \(\(3,\), \(\)\), but policy \(\(2, 3\), \(\)\)",
    ),
    (
        lambda: mean_kl_divergence(Beta(torch.ones(2), torch.ones(2)), Bernoulli(torch.ones(2) / 2)),
        r"KL\(Beta \|\| Bernoulli\) has no closed form",
    ),
    (
        lambda: mean_kl_divergence(*[Normal(torch.full((2,), torch.nan), 1.0, validate_args=False)] * 2),
        "The divergence is NaN at some steps",
    ),
    (lambda: policy_change(drawn(torch.zeros(3, 2)), torch.zeros(3)), r"log_prob has shape \(3,\), but the draws have"),
    (lambda: policy_change(drawn(torch.zeros(2, 1)), torch.full((2, 1), -torch.inf)), "log_prob is -inf in 2 of 2"),
    (
        lambda: policy_change(drawn(torch.zeros(2, 1), mask=torch.zeros(2, 1) > 0), torch.zeros(2, 1)),
        "All of log_prob is masked",
    ),
]


@pytest.mark.parametrize(("call", "message"), REFUSED)
def test_refusals(call, message):
    with pytest.raises(sf.ScorefnError, match=message):
        call()
