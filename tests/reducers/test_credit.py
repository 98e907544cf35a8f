"""Credits against the dense definition, and the scan against a loop."""

import copy
import pickle
from dataclasses import FrozenInstanceError

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import scorefn as sf


@st.composite
def episodes(draw):
    """Values and flags of several episodes in a row."""
    lead = draw(st.sampled_from([(1,), (3,), (2, 2)]))
    steps = draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    v = torch.randn(*lead, steps, generator=generator, dtype=torch.float64)
    ends = draw(st.sampled_from([None, 0.0, 0.3, 0.7, 1.0]))
    done = None if ends is None else torch.rand(*lead, steps, generator=generator) < ends
    return v, done, draw(st.sampled_from([0.0, 0.3, 0.9, 1.0]))


def dense(done, steps):
    """M[k, j] = 1 where j >= k lies in k's episode, and the age of each step."""
    number = torch.zeros(steps) if done is None else done.double().cumsum(-1) - done.double()
    same = number.unsqueeze(-1) == number.unsqueeze(-2)
    M = (same & torch.ones(steps, steps, dtype=torch.bool).triu()).double()
    return M, M.sum(-2) - 1


@given(episodes())
def test_reward_to_go_is_the_dense_matrix(episode):
    v, done, discount = episode
    credit = sf.RewardToGo(discount, done=done)
    for row in torch.cartesian_prod(*[torch.arange(s) for s in v.shape[:-1]]).reshape(-1, v.ndim - 1):
        at = tuple(row.tolist())
        M, age = dense(None if done is None else done[at], v.shape[-1])
        close = {"rtol": 1e-11, "atol": 1e-12}
        torch.testing.assert_close(credit.influence(v)[at], M @ v[at], **close)
        torch.testing.assert_close(credit.influence_adjoint(v)[at], M.T @ v[at], **close)
        torch.testing.assert_close(credit.predecessors(v)[at], M.T @ v[at] - v[at], **close)
        torch.testing.assert_close(credit(v)[at], M @ (discount**age * v[at]), **close)
        usual = (M * discount ** (age - age.unsqueeze(-1)).clamp(min=0)) @ v[at]
        torch.testing.assert_close(sf.RewardToGo(discount, False, done)(v)[at], usual, **close)


@given(episodes(), st.booleans())
def test_a_credit_is_its_influence_between_its_weights(episode, visitation_discount):
    v, done, discount = episode
    credit = sf.RewardToGo(max(discount, 0.1), visitation_discount, done)
    value_weight, decision_weight = (
        1.0 if w is None else w for w in (credit.value_weight(v), credit.decision_weight(v))
    )
    right = decision_weight * credit.influence(value_weight * v)
    torch.testing.assert_close(credit(v), right, rtol=1e-6, atol=1e-9)


@given(episodes(), st.integers(0, 2**31))
def test_the_adjoint_is_the_adjoint(episode, seed):
    v, done, _ = episode
    u = torch.randn(v.shape, generator=torch.Generator().manual_seed(seed), dtype=v.dtype)
    mask = torch.rand(v.shape[-1], v.shape[-1], generator=torch.Generator().manual_seed(seed)) < 0.5
    for credit in [sf.RewardToGo(done=done), sf.Influence(mask)]:
        one, other = (credit.influence(v) * u).sum(), (v * credit.influence_adjoint(u)).sum()
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)
    total = sf.Total()
    one = (total.influence(v) * u).sum()
    torch.testing.assert_close(one, (v * total.influence_adjoint(u)).sum(), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("discount", [0.5, 0.99, 0.3])
def test_long_episodes_do_not_overflow(discount):
    """discount^-t would: the usual update is made without it."""
    v = torch.ones(1, 2000)
    charged = sf.RewardToGo(discount, visitation_discount=False)(v)
    assert charged.isfinite().all()
    torch.testing.assert_close(charged[0, 0], torch.tensor(1 / (1 - discount)))
    torch.testing.assert_close(charged[0, -1], torch.tensor(1.0))


@pytest.mark.parametrize(
    ("credit", "unbiased"),
    [
        (sf.Total(), True),
        (sf.RewardToGo(), True),
        (sf.RewardToGo(0.9), True),
        (sf.RewardToGo(1.0, visitation_discount=False), True),
        (sf.RewardToGo(0.9, visitation_discount=False), False),
        (sf.Influence(torch.ones(1, 1, dtype=torch.bool)), True),
    ],
)
def test_each_declares_whether_it_is_a_gradient(credit, unbiased):
    assert credit.unbiased is unbiased
    assert (credit.decision_weight(torch.zeros(1, 1)) is None) is unbiased


def test_reward_to_go_is_gae_on_td_errors():
    discount, lambda_, delta = 0.9, 0.8, torch.randn(3, 6, dtype=torch.float64)
    done = torch.zeros(3, 6, dtype=torch.bool)
    done[1, 2] = True
    right = torch.zeros(3, 6, dtype=torch.float64)
    for n in range(3):
        running = 0.0
        for t in reversed(range(6)):
            running = delta[n, t] + (0.0 if done[n, t] else discount * lambda_ * running)
            right[n, t] = running
    found = sf.RewardToGo(discount * lambda_, visitation_discount=False, done=done)(delta)
    torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-13)


def test_influence_predecessors_never_contain_their_own_decision():
    for seed in range(20):
        mask = torch.rand(4, 3, generator=torch.Generator().manual_seed(seed)) < 0.5
        probe = torch.eye(4)  # which decisions enter whose sum
        before = sf.Influence(mask).predecessors(probe)
        assert (before.diag() == 0).all()
        for i in range(4):
            for k in range(4):
                contains = bool((mask[i] | ~mask[k]).all())
                if before[i, k]:
                    assert contains
                strictly = contains and not bool((mask[k] | ~mask[i]).all())
                if strictly:
                    assert before[i, k] == 1


def test_a_credit_leaves_its_input_as_it_is():
    v = torch.randn(3, 5)
    kept = v.clone()
    for credit in [sf.Total(), sf.RewardToGo(0.9), sf.Influence(torch.ones(5, 5, dtype=torch.bool))]:
        credit(v), credit.influence_adjoint(v), credit.predecessors(v)
    assert torch.equal(v, kept)


def test_without_discount_only_the_first_value_counts():
    """discount = 0 is no discount of 1: the value of the surrogate is f's first value."""
    log_prob = torch.randn(4, 3, requires_grad=True)
    draws = sf.Draws(torch.zeros(4), log_prob, torch.randn(4, 3))
    value = sf.surrogate(draws, credit=sf.RewardToGo(0.0))
    assert torch.equal(value, draws.fx[:, 0])
    wanted = torch.cat([draws.fx[:, :1], torch.zeros(4, 2)], -1)
    torch.testing.assert_close(torch.autograd.grad(value.sum(), log_prob)[0], wanted)


TENSOR_PARTS = [
    lambda: sf.Constant(torch.ones(2)),
    lambda: sf.Influence(torch.eye(2, dtype=torch.bool)),
    lambda: sf.RewardToGo(done=torch.ones(3, 2, dtype=torch.bool)),
]


@pytest.mark.parametrize("make", TENSOR_PARTS)
def test_parts_that_hold_tensors_are_frozen_and_compared_by_identity(make):
    part = make()
    assert part == part
    assert part != make()
    with pytest.raises(FrozenInstanceError):
        part.done = None


def test_the_converted_mask_is_kept_and_follows_the_mask():
    mask = torch.tensor([[True, False], [True, True]])
    credit, v = sf.Influence(mask), torch.tensor([[1.0, 2.0]])
    assert credit(v).tolist() == [[1.0, 3.0]]
    assert credit._weights(v) is credit._weights(2 * v)
    assert credit(v.double()).dtype == torch.float64
    mask[0, 1] = True
    assert credit(v).tolist() == [[3.0, 3.0]]
    again = pickle.loads(pickle.dumps(credit))
    assert "_kept" not in vars(again)
    assert again(v).tolist() == copy.deepcopy(credit)(v).tolist() == [[3.0, 3.0]]
    assert credit[:1] is credit
    assert "_kept" not in repr(credit)


def test_a_mask_converted_in_inference_mode_does_not_stay():
    credit = sf.Influence(torch.ones(2, 2, dtype=torch.bool))
    v = torch.ones(1, 2, requires_grad=True)
    with torch.inference_mode():
        credit(v.detach())
    credit(v).sum().backward()
    assert v.grad.tolist() == [[2.0, 2.0]]
    batched = torch.func.vmap(torch.func.grad(lambda v: credit(v).sum()))(torch.ones(3, 1, 2))
    assert batched.tolist() == [[[2.0, 2.0]]] * 3
    assert credit(v).tolist() == [[2.0, 2.0]]


def test_what_is_no_discount_and_what_are_no_flags():
    for wrong in ("x", None):
        with pytest.raises(sf.ScorefnError, match=rf"discount must be a number in \[0, 1\], but it is {wrong!r}"):
            sf.RewardToGo(wrong)
    for wrong, found in ((torch.zeros(2, 3), "torch.float32"), ([[True]], "list")):
        with pytest.raises(sf.ScorefnError, match=f"done must be a tensor of bool.* but it is {found}"):
            sf.RewardToGo(done=wrong)


@given(episodes())
def test_what_reward_to_go_leaves_alone_is_what_came_before(episode):
    v, done, discount = episode
    found = sf.RewardToGo(discount, done=done).uninfluenced(v)
    for t in range(v.shape[-1]):
        torch.testing.assert_close(found[..., t], v[..., :t].sum(-1), rtol=1e-11, atol=1e-12)
