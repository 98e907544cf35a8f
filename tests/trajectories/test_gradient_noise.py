"""The noise of a gradient from one backward pass, against one pass for each draw."""

import importlib
import itertools

import numpy as np
import pytest
import torch
from torch.distributions import Bernoulli, Normal

import scorefn as sf
from scorefn.trajectories import gradient_noise, per_draw, split_halves
from tests.trajectories.corridor import SEQUENCES, Scripted, corridors
from tests.trajectories.meter_cases import BLOCKS, FAST, SLOW, N, by_hand, flat, gaussian, network, steps, unused

pytestmark = pytest.mark.usefixtures("float64")


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
