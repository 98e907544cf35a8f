"""Law 4: credits are their dense matrices, and the recurrence is its loop."""

import pytest
import torch
from hypothesis import given as hypothesis_given
from hypothesis import strategies as st

import scorefn as sf
from tests.oracles.tolerances import near
from tests.oracles.toys import values
from tests.oracles.twins import check_adjoint, check_identity, check_recurrence, check_twin, dense_reward_to_go

SEED = st.integers(0, 2**31 - 1)
SIZES = st.integers(1, 9)
LEAD = st.sampled_from([(1,), (3,), (2, 2), (2, 1, 3)])


@st.composite
def episodes(draw_):
    lead, T = draw_(LEAD), draw_(SIZES)
    flags = draw_(st.lists(st.booleans(), min_size=0, max_size=40)) or [False]
    done = torch.tensor([flags[i % len(flags)] for i in range(torch.Size(lead).numel() * T)]).reshape(*lead, T)
    return done, draw_(SEED)


@st.composite
def matrices(draw_):
    K, J = draw_(SIZES), draw_(SIZES)
    flags = draw_(st.lists(st.booleans(), min_size=K * J, max_size=K * J))
    return torch.tensor(flags).reshape(K, J), draw_(LEAD), draw_(SEED)


@hypothesis_given(LEAD, SIZES, SIZES, SEED)
def test_total_is_all_ones(lead, K, J, seed):
    v, u = values((*lead, J), seed), values((*lead, K), seed + 1)
    check_adjoint(sf.Total(), v, u)
    check_twin(sf.Total(), torch.ones(K, J, dtype=torch.bool), v, u)
    assert sf.Total().influence(v).shape == (*lead, 1)


@hypothesis_given(matrices())
def test_influence_is_its_matrix(case):
    mask, lead, seed = case
    v, u = values((*lead, mask.shape[1]), seed), values((*lead, mask.shape[0]), seed + 1)
    check_adjoint(sf.Influence(mask), v, u)
    check_twin(sf.Influence(mask), mask, v, u)
    containing = torch.zeros_like(u)
    for k in range(len(mask)):
        for i in range(len(mask)):
            contains = bool((mask[i] | ~mask[k]).all())
            strictly = contains and not torch.equal(mask[i], mask[k])
            if strictly or (contains and i < k):
                containing[..., k] += u[..., i]
    assert near(sf.Influence(mask).predecessors(u), containing)


@hypothesis_given(episodes(), st.sampled_from([1.0, 0.9, 0.5]), st.booleans())
def test_reward_to_go_is_its_matrix(case, discount, visitation):
    done, seed = case
    v, u = values(done.shape, seed), values(done.shape, seed + 1)
    credit = sf.RewardToGo(discount, visitation, done)
    check_adjoint(credit, v, u)
    ages = torch.zeros_like(v)
    for index in torch.cartesian_prod(*[torch.arange(size) for size in done.shape[:-1]]).reshape(-1, done.ndim - 1):
        row = tuple(index.tolist())
        check_twin(sf.RewardToGo(discount, visitation, done[row]), dense_reward_to_go(done[row]), v[row], u[row])
        for name, argument in (("influence", v), ("influence_adjoint", u), ("predecessors", u)):
            alone = getattr(sf.RewardToGo(discount, visitation, done[row]), name)(argument[row])
            assert near(getattr(credit, name)(argument)[row], alone)
        for t in range(1, done.shape[-1]):
            ages[(*row, t)] = 0.0 if done[(*row, t - 1)] else ages[(*row, t - 1)] + 1
    check_identity(credit, v, ages, discount, visitation)


@hypothesis_given(LEAD, SIZES, SEED, st.sampled_from([1.0, 0.9, 0.5]), st.booleans())
def test_reward_to_go_of_one_episode(lead, T, seed, discount, visitation):
    v, u = values((*lead, T), seed), values((*lead, T), seed + 1)
    credit = sf.RewardToGo(discount, visitation)
    check_adjoint(credit, v, u)
    check_twin(credit, torch.ones(T, T, dtype=torch.bool).triu(), v, u)
    check_identity(credit, v, torch.arange(T).to(v).expand_as(v), discount, visitation)


@pytest.mark.parametrize("visitation", [True, False])
def test_reward_to_go_keeps_the_precision_of_the_values(visitation):
    """In float64 a discount of .9 is .9, not its neighbour in float32; with `done` as without."""
    v = values((2, 7), 0)
    done = torch.zeros_like(v, dtype=torch.bool)
    plain, cut = sf.RewardToGo(0.9, visitation)(v), sf.RewardToGo(0.9, visitation, done)(v)
    assert near(plain, cut), (plain - cut).abs().max()


DECAYS = st.sampled_from(["float", "one", "scalar", "full", "thin"])


@hypothesis_given(st.integers(1, 13), st.booleans(), st.integers(-2, 1), SEED, DECAYS)
def test_linear_recurrence_is_the_loop(T, reverse, dim, seed, kind):
    shape = [2, 3]
    shape.insert(dim if dim >= 0 else len(shape) + 1 + dim, T)
    full = values(shape, seed + 1)
    full[full.abs() < 0.3] = 0.0  # ends of episodes
    decay = {
        "float": 0.7,
        "one": 1.0,
        "scalar": torch.tensor(0.7, dtype=torch.float64),
        "full": full,
        "thin": full.movedim(dim, 0)[:, :1, :1].movedim(0, dim),
    }[kind]
    check_recurrence(values(shape, seed), decay, reverse, dim)


@pytest.mark.parametrize("reverse", [True, False])
def test_linear_recurrence_passes_gradcheck(reverse):
    x, decay = values((5, 2), 0).requires_grad_(), values((5, 2), 1).requires_grad_()

    def run(x, decay):
        return sf.linear_recurrence(x, decay, reverse=reverse, dim=0)

    assert torch.autograd.gradcheck(run, (x, decay))
    assert torch.autograd.gradgradcheck(run, (x, decay))
