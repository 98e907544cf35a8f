"""Moments read off a backward pass, against the gradients of single draws in a loop."""

import pytest
import torch
from torch import nn

import scorefn as sf
from scorefn.diagnostics import GradientMeter

F64 = torch.float64


def moments_by_loop(module, losses):
    """Mean and variance of the gradient of ``losses.sum()``, from the gradient of each draw."""
    names, parameters = zip(*[(n, q) for n, q in module.named_parameters() if q.requires_grad], strict=True)
    rows = [
        torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
        for loss in losses
    ]
    N = len(rows)
    stacked = {name: torch.stack([row[i] for row in rows]) for i, name in enumerate(names)}
    return {n: g.sum(0) for n, g in stacked.items()}, {n: N * g.var(0) for n, g in stacked.items()}


class Sequence(nn.Module):
    """Tokens [N, T], an embedding, a layer of [N, T, 4] and one of [N, 3] that is called twice."""

    def __init__(self, padding_idx=None):
        super().__init__()
        self.embedding = nn.Embedding(5, 4, padding_idx=padding_idx, dtype=F64)
        self.inner = nn.Linear(4, 3, dtype=F64)
        self.outer = nn.Linear(3, 3, bias=False, dtype=F64)

    def forward(self, tokens):
        hidden = self.inner(self.embedding(tokens)).tanh().sum(1)
        return self.outer(self.outer(hidden).tanh()).square().sum(-1)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def check(module, losses_of, reduce):
    losses = losses_of()
    scale = 1 / len(losses) if reduce == "mean" else 1.0
    mean, variance = moments_by_loop(module, scale * losses)
    with (meter := GradientMeter(module)):
        getattr(losses_of(), reduce)().backward()
    found = meter.latest
    assert set(found.mean) == set(mean)
    for name in mean:
        torch.testing.assert_close(found.mean[name], mean[name], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(found.variance[name], variance[name], rtol=1e-10, atol=1e-12)
    total = sum(v.sum() for v in variance.values()).item()
    signal = sum(m.square().sum() for m in mean.values()).item() - total
    assert found.num_draws == len(losses)
    assert found.total_variance == pytest.approx(total, rel=1e-10)
    assert found.signal_to_noise == pytest.approx(max(signal, 0) / total, rel=1e-8)
    if signal > 0:
        assert found.noise_scale == pytest.approx(len(losses) * total / signal, rel=1e-8)
    for name, q in module.named_parameters():
        if q.requires_grad:
            torch.testing.assert_close(
                found.mean[name], mean[name] if q.grad is None else q.grad, rtol=1e-10, atol=1e-12
            )


@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_rows(reduce):
    module = nn.Sequential(nn.Linear(3, 5, dtype=F64), nn.Tanh(), nn.Linear(5, 2, dtype=F64))
    x = torch.randn(7, 3, dtype=F64) + 1
    check(module, lambda: module(x).square().sum(-1), reduce)


@pytest.mark.parametrize("padding_idx", [None, 2])
def test_sequences_embeddings_and_repeated_calls(padding_idx):
    module = Sequence(padding_idx)
    tokens = torch.randint(5, (6, 4))
    check(module, lambda: module(tokens), "mean")


def test_many_draws_of_sequences_in_pieces(monkeypatch):
    monkeypatch.setattr("scorefn.diagnostics.second_moments._ELEMENTS", 30)
    module = nn.Linear(3, 4, dtype=F64)
    x = torch.randn(9, 5, 3, dtype=F64)
    check(module, lambda: module(x).tanh().sum((1, 2)), "sum")


def test_frozen_and_unused_layers():
    module = nn.ModuleList([nn.Linear(3, 2, dtype=F64), nn.Linear(3, 2, dtype=F64), nn.Linear(2, 1, dtype=F64)])
    module[0].requires_grad_(False)
    module[2].weight.requires_grad_(False)
    module[2].bias.requires_grad_(False)
    x = torch.randn(4, 3, dtype=F64)
    check(module, lambda: module[2](module[0](x)).squeeze(-1) + module[1](x).square().sum(-1), "mean")
    used = nn.ModuleList([nn.Linear(3, 2, dtype=F64), nn.Linear(3, 2, dtype=F64)])
    check(used, lambda: used[0](x).square().sum(-1), "mean")


def test_the_surrogate_of_a_policy_agrees_with_the_meter_of_draws():
    policy = nn.Sequential(nn.Linear(2, 8, dtype=F64), nn.Tanh(), nn.Linear(8, 3, dtype=F64))
    observations = torch.randn(20, 2, dtype=F64)
    p = torch.distributions.Categorical(logits=policy(observations))
    x = p.sample()
    with (meter := GradientMeter(policy)):
        p = torch.distributions.Categorical(logits=policy(observations))
        per_draw = x.to(F64).square() * p.log_prob(x)
        per_draw.mean().backward()
    p = torch.distributions.Categorical(logits=policy(observations))
    noise = sf.trajectories.gradient_noise(x.to(F64).square() * p.log_prob(x), policy.parameters())
    assert meter.latest.total_variance == pytest.approx(noise.total_variance, rel=1e-9)
    assert meter.latest.noise_scale == pytest.approx(noise.noise_scale, rel=1e-9)


def test_it_measures_every_so_many_steps_and_leaves_no_hooks():
    module, x = nn.Linear(2, 1), torch.randn(3, 2)
    meter = GradientMeter(module, every=3)
    seen = []
    for _ in range(7):
        with meter:
            assert bool(module._forward_hooks) == (len(seen) % 3 == 0)
            module(x).sum().backward()
        assert not module._forward_hooks
        seen.append(meter.latest)
    assert [a is not b for a, b in zip(seen, [None, *seen], strict=False)] == [True, False, False] * 2 + [True]
    assert repr(meter) == "GradientMeter(1 layers, every=3)"


def test_an_error_inside_is_the_users_own_and_leaves_nothing_behind():
    module = nn.Linear(2, 1)
    meter = GradientMeter(module)
    with pytest.raises(ZeroDivisionError), meter:
        module(torch.ones(3, 2) * (1 // 0))
    assert meter.latest is None
    assert not module._forward_hooks


def test_no_noise_and_no_gradient():
    module = nn.Linear(1, 1, bias=False, dtype=F64)
    with (meter := GradientMeter(module)):
        module(torch.ones(4, 1, dtype=F64)).mean().backward()
    assert meter.latest.signal_to_noise == float("inf")
    assert meter.latest.noise_scale == 0.0
    with (meter := GradientMeter(module)):
        (0 * module(torch.ones(4, 1, dtype=F64))).mean().backward()
    assert meter.latest.signal_to_noise != meter.latest.signal_to_noise


def test_other_layers_are_named():
    module = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 1))
    with pytest.raises(sf.ScorefnError, match=r'LayerNorm "1" in Sequential.*plain Linear.*submodule'):
        GradientMeter(module)
    module[1].requires_grad_(False)
    GradientMeter(module)
    with pytest.raises(sf.ScorefnError, match="GRU itself"):
        GradientMeter(nn.GRU(2, 3))
    with pytest.raises(sf.ScorefnError, match="Linear"):
        GradientMeter(nn.utils.parametrizations.weight_norm(nn.Linear(2, 3)))


def test_what_cannot_be_measured():
    with pytest.raises(sf.ScorefnError, match=r"a torch\.nn\.Module.*function"):
        GradientMeter(lambda x: x)
    with pytest.raises(sf.ScorefnError, match="no parameters that require grad"):
        GradientMeter(nn.Tanh())
    with pytest.raises(sf.ScorefnError, match="every must be an integer of at least 1"):
        GradientMeter(nn.Linear(2, 1), every=0)
    tied = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    tied[1].weight = tied[0].weight
    with pytest.raises(sf.ScorefnError, match='"0" and "1" share a parameter'):
        GradientMeter(tied)
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    before = [q.clone() for q in module.parameters()]
    for inside, message in {
        (lambda: module(torch.ones(3, 2)), r"No gradient reached.*loss\.backward"),
        (lambda: module(torch.ones(1, 2)).sum().backward(), "given 1 draw, but at least 2"),
        (lambda: module(torch.ones(2)).sum().backward(), r"shape \(2,\), without an axis of draws"),
        (
            lambda: module[1](module[0](torch.ones(3, 4, 2)).flatten(0, 1)).sum().backward(),
            '"1" was given 12 rows and "0" 3',
        ),
        (lambda: (module(torch.ones(3, 2)) * torch.nan).sum().backward(), "NaN or infinite"),
    }:
        meter = GradientMeter(module)
        with pytest.raises(sf.ScorefnError, match=message), meter:
            inside()
        assert meter.latest is None
        assert not module[0]._forward_hooks
    x = torch.ones(3, 2)
    meter = GradientMeter(nn.Linear(2, 1))
    layer = next(iter(meter._layers.values()))
    layer.weight.requires_grad_(False)

    def step():
        y = layer(x).sum()
        x.zero_()
        y.backward()

    with pytest.raises(sf.ScorefnError, match="changed in place"), meter:
        step()
    twice = GradientMeter(module)
    with pytest.raises(sf.ScorefnError, match="one step at a time"), twice, twice:
        pass
    assert not module[0]._forward_hooks
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
