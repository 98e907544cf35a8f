"""Draws: what is made of the fields, and what a part of the draws keeps."""

from dataclasses import FrozenInstanceError

import pytest
import torch
from torch.distributions import Bernoulli, Categorical, Normal

import scorefn as sf

N, B, K = 6, 2, 3


def whole(**fields):
    given = {
        "x": {"a": torch.arange(N), "b": (torch.randn(N, B, 4),)},
        "log_prob": torch.randn(N, B, K, requires_grad=True),
        "fx": torch.randn(N, B, K),
        "credit": sf.RewardToGo(0.9, done=torch.rand(N, B, K) < 0.3),
        "behaviour_log_prob": torch.randn(N, B, K),
        "mask": torch.rand(N, B, K) < 0.7,
        "block": torch.arange(N) // 2,
        "group": torch.arange(N) // 3,
        "context": [torch.randn(N, B, K, 5)],
    }
    return sf.Draws(**given | fields)


PARTS = [slice(0, 2), slice(3, 4), slice(None, None, 2), slice(-2, None), torch.tensor([5, 0, 0])]
PARTS += [torch.tensor([True, False, True, True, False, False])]


@pytest.mark.parametrize("index", PARTS)
def test_a_part_takes_every_field(index):
    draws = whole()
    part = draws[index]
    assert len(part) == len(torch.arange(N)[index])
    for name in ["log_prob", "fx", "behaviour_log_prob", "mask", "block", "group"]:
        assert torch.equal(getattr(part, name), getattr(draws, name)[index]), name
    assert torch.equal(part.x["a"], draws.x["a"][index])
    assert torch.equal(part.x["b"][0], draws.x["b"][0][index])
    assert torch.equal(part.context[0], draws.context[0][index])
    assert torch.equal(part.credit.done, draws.credit.done[index])
    assert part.log_prob.requires_grad


@pytest.mark.parametrize("index", PARTS)
@pytest.mark.parametrize("verb", [sf.surrogate, sf.dice])
def test_a_part_has_its_own_surrogates(index, verb):
    log_prob, fx = torch.randn(N, B, K, requires_grad=True), torch.randn(N, B, K, requires_grad=True)
    draws = whole(log_prob=log_prob, fx=fx)
    torch.testing.assert_close(verb(draws[index]), verb(draws)[index])
    weight = torch.zeros(N, B)
    weight.index_put_((torch.arange(N)[index],), torch.ones(()), accumulate=True)
    whole_gradient = torch.autograd.grad((weight * verb(draws)).sum(), (log_prob, fx), retain_graph=True)
    part_gradient = torch.autograd.grad(verb(draws[index]).sum(), (log_prob, fx))
    for first, second in zip(whole_gradient, part_gradient, strict=True):
        torch.testing.assert_close(first, second)


def test_a_part_of_plain_draws():
    theta = torch.zeros(B, requires_grad=True)
    draws = sf.draw(Normal(theta, 1.0), lambda x: x**2, N)
    part = draws[1:3]
    assert torch.equal(part.x, draws.x[1:3])
    assert part.context is None
    assert part.mask is None
    assert part.block is None
    assert len(part) == part.num_blocks == 2


def test_an_empty_part_is_refused():
    with pytest.raises(sf.ShapeError, match="at least"):
        whole()[:0]


def test_splits_with_a_common_baseline_add_up():
    theta = torch.randn(B, dtype=torch.float64, requires_grad=True)
    draws = sf.draw(Normal(theta, 1.0), lambda x: x**2, N)
    b = sf.LeaveOneOut()(draws.signal(), draws)
    together = torch.autograd.grad(sf.surrogate(draws, baseline=sf.LeaveOneOut()).sum(), theta, retain_graph=True)[0]
    apart = sum(
        torch.autograd.grad(sf.surrogate(draws[s], baseline=sf.Constant(b[s])).sum(), theta, retain_graph=True)[0]
        for s in (slice(0, 1), slice(1, 4), slice(4, 6))
    )
    torch.testing.assert_close(apart, together, rtol=1e-12, atol=1e-14)


def test_blocks_are_counted():
    assert whole().num_blocks == 3
    assert whole(block=None).num_blocks == N
    assert whole(block=torch.tensor([7, 7, -1, 7, -1, 7])).num_blocks == 2


def test_draws_are_frozen_and_compared_by_identity():
    draws = whole()
    with pytest.raises(FrozenInstanceError):
        draws.fx = draws.fx + 1
    assert draws == draws
    assert draws != whole()


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.int32, torch.uint8])
def test_bools_and_integers_become_numbers(dtype):
    fx = torch.tensor([[0], [1], [1]], dtype=dtype)
    draws = sf.Draws(torch.zeros(3), torch.zeros(3, 1, requires_grad=True), fx)
    assert draws.fx.dtype == torch.float32
    assert draws.fx.flatten().tolist() == [0.0, 1.0, 1.0]


def test_absent_decisions_count_for_nothing_even_where_they_are_not_a_number():
    log_prob = torch.randn(N, B, K)
    mask = torch.rand(N, B, K) < 0.6
    spoiled = torch.where(mask, log_prob, torch.nan).requires_grad_()
    fx = torch.randn(N, B, 1)
    draws = sf.Draws(torch.zeros(N), spoiled, fx, mask=mask)
    assert torch.equal(draws.log_prob, torch.where(mask, log_prob, 0.0))
    for verb in (sf.surrogate, sf.dice):
        found = torch.autograd.grad(verb(draws, baseline=sf.LeaveOneOut()).sum(), spoiled, retain_graph=True)[0]
        assert torch.equal(found != 0, mask)
        assert found.isfinite().all()
    behaviour = torch.where(mask, log_prob, -torch.inf)
    weighted = sf.Draws(torch.zeros(N), spoiled, fx, mask=mask, behaviour_log_prob=behaviour)
    torch.testing.assert_close(sf.surrogate(weighted), fx[..., 0])


def test_the_signal_is_detached_and_has_the_shape_of_the_decisions():
    draws = whole(fx=torch.randn(N, B, K, requires_grad=True))
    assert draws.signal().shape == (N, B, K)
    assert not draws.signal().requires_grad
    assert draws.signal(sf.Total()).shape == (N, B, 1)


def test_the_weighted_signal_by_hand():
    """Off-policy w_j = exp of the log-ratios of the decisions that influence j, before the credit."""
    log_prob, behaviour, fx = torch.randn(N, B, K, requires_grad=True), torch.randn(N, B, K), torch.randn(N, B, K)
    draws = sf.Draws(torch.zeros(N), log_prob, fx, sf.RewardToGo(0.5), behaviour_log_prob=behaviour)
    weight = (log_prob - behaviour).detach().cumsum(-1).exp()
    discount = 0.5 ** torch.arange(K)
    signal = (discount * weight * fx).flip(-1).cumsum(-1).flip(-1)
    torch.testing.assert_close(draws.signal(), signal)
    torch.testing.assert_close(sf.surrogate(draws), (discount * weight * fx).sum(-1))
    torch.testing.assert_close(sf.dice(draws), (discount * weight * fx).sum(-1))
    found = torch.autograd.grad(sf.surrogate(draws).sum(), log_prob)[0]
    torch.testing.assert_close(found, signal)
    b = torch.randn(B, K)
    found = torch.autograd.grad(sf.surrogate(draws, baseline=sf.Constant(b)).sum(), log_prob)[0]
    torch.testing.assert_close(found, signal - weight * b)


def test_a_credit_completes_itself_from_the_adapters():
    draws = whole(behaviour_log_prob=None)
    mine = sf.RewardToGo(0.5, visitation_discount=False)
    bound = draws.bound(mine).credit
    assert torch.equal(bound.done, draws.credit.done)
    assert (bound.discount, bound.visitation_discount) == (0.5, False)
    assert mine.done is None
    own = sf.RewardToGo(0.5, done=torch.zeros(N, B, K, dtype=torch.bool))
    assert torch.equal(draws.bound(own).credit.done, own.done)
    assert draws.bound(None) is draws
    assert draws.credit.done is not own.done


def test_total_is_allowed_for_a_single_decision():
    theta = torch.zeros(B, requires_grad=True)
    draws = sf.draw(Bernoulli(logits=theta), lambda x: x, N)
    assert torch.equal(sf.surrogate(draws, credit=sf.Total()), sf.surrogate(draws))


# ------------------------------------------------------------------------------ f works on a copy of the draws


def flip_through_numpy(x):
    array = x.numpy()
    out = torch.from_numpy(array[:, 0].copy())
    array[:] = 1 - array
    return out


def test_a_change_of_the_draws_that_torch_cannot_see_is_harmless():
    parameter = torch.tensor([1.0], requires_grad=True)
    p = Bernoulli(logits=parameter)
    draws = sf.draw(p, flip_through_numpy, 50)
    assert torch.equal(draws.fx[:, 0], draws.x[:, 0])
    torch.testing.assert_close(draws.log_prob, p.log_prob(draws.x))
    (score,) = torch.autograd.grad(sf.surrogate(draws).sum(), parameter)
    by_hand = (draws.x[:, 0] * (draws.x[:, 0] - parameter.detach().sigmoid())).sum()
    torch.testing.assert_close(score.sum(), by_hand)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # read by Dynamo at a break of its graph
@pytest.mark.parametrize("wrap", ["grad", "compile"])
def test_a_change_of_the_draws_where_versions_cannot_be_read_is_harmless(wrap):
    def flip(x):
        first = x[:, 0].clone()
        x.neg_().add_(1)
        return first

    def keep(x):
        return x[:, 0].clone()

    def loss(parameter, f):
        return sf.expectation(Bernoulli(logits=parameter, validate_args=False), f, 64)

    results = []
    for f in (flip, keep):
        torch.manual_seed(3)
        if wrap == "grad":
            results.append(torch.func.grad(loss)(torch.tensor([1.0]), f))
        else:
            parameter = torch.tensor([1.0], requires_grad=True)
            compiled = torch.compile(lambda parameter, f=f: loss(parameter, f), backend="eager")
            results.append(torch.autograd.grad(compiled(parameter), parameter)[0])
    torch.testing.assert_close(results[0], results[1])


# ----------------------------------------------------------------------------- baselines at absent decisions


@pytest.mark.parametrize("verb", [sf.surrogate, sf.dice])
def test_what_a_baseline_says_of_absent_decisions_does_not_matter(verb):
    mask = torch.tensor([[True, True], [True, False], [True, True]])
    logits = torch.tensor([0.3, -0.2], requires_grad=True)
    log_prob = logits.log_softmax(0).expand(3, 2)
    draws = sf.Draws(torch.zeros(3), log_prob, torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.5, 1.5]]), mask=mask)

    def garbage(signal, draws):
        return torch.where(draws.mask, 0.7, torch.nan)

    def clean(signal, draws):
        return torch.full((3, 2), 0.7)

    value, reference = verb(draws, baseline=garbage), verb(draws, baseline=clean)
    torch.testing.assert_close(value, reference)
    gradients = [torch.autograd.grad(v.mean(), logits, retain_graph=True)[0] for v in (value, reference)]
    assert gradients[0].isfinite().all()
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("verb", [sf.surrogate, sf.dice])
def test_a_baseline_that_is_not_a_number_is_refused(verb):
    logits = torch.zeros(3, requires_grad=True)
    draws = sf.draw(Categorical(logits=logits), lambda x: x.float(), 5)
    with pytest.raises(sf.NonFiniteError, match=r"function returned nan.*gradient NaN"):
        verb(draws, baseline=lambda signal, draws: signal * torch.nan)
