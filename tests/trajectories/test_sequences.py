"""Sequences as draws: exact gradients on the token task, the KL's included, and refusals."""

import subprocess
import sys

import pytest
import torch

import scorefn as sf
from scorefn.trajectories import Sequences, kl_surrogate, sequence_draws
from tests.oracles.tolerances import near
from tests.trajectories import token_task as task

T = task.mask
NAN = float("nan")


def spoilt(values):
    """NaN wherever a sequence is over: it must not matter."""
    return torch.where(T, values, NAN)


@pytest.fixture
def theta():
    return task.policy(0)


@pytest.fixture
def behaviour():
    return task.policy(1).detach()


@pytest.fixture
def reference():
    return task.policy(2).detach()


def log_ratio(theta, reference):
    return task.log_prob(theta) - task.log_prob(reference)


def divergence(theta, reference):
    return (task.probability(theta) * log_ratio(theta, reference).sum(-1)).sum()


# ------------------------------------------------------------------------------------------------------ what it makes


def test_a_reward_of_the_sequence_is_charged_to_all_its_tokens():
    logp = torch.zeros(2, 3, requires_grad=True)
    draws = sequence_draws(logp, [1.0, 2.0], group=torch.tensor([7, 7]))
    assert draws.fx.tolist() == [[1.0], [2.0]]
    assert draws.credit == sf.Total()
    assert draws.group.tolist() == [7, 7]
    assert draws.behaviour_log_prob is None
    assert draws.mask is None
    assert draws.x == Sequences(draws.x.reward, None)


def test_a_reward_of_each_token_is_charged_to_the_tokens_up_to_it():
    logp = torch.zeros(1, 3, requires_grad=True)
    draws = sequence_draws(logp, torch.tensor([[1.0, NAN, 4.0]]), mask=torch.tensor([[True, False, True]]))
    assert draws.signal().tolist() == [[5.0, 4.0, 4.0]]


def test_the_reward_stands_at_the_last_token_that_counts_beside_the_kl():
    logp = torch.tensor([[-1.0, NAN, -3.0, -9.0], [-1.0, -2.0, -3.0, -4.0]], requires_grad=True)
    ref = torch.tensor([[-2.0, -8.0, -3.5, NAN], [-1.0, -1.0, -1.0, -1.0]])
    mask = torch.tensor([[True, False, True, False], [True] * 4])
    draws = sequence_draws(logp, torch.tensor([10, 20]), mask=mask, ref_logp=ref, kl_weight=0.5)
    assert draws.fx.tolist() == [[-0.5, 0.0, 9.75, 0.0], [0.0, 0.5, 1.0, 21.5]]
    assert isinstance(draws.credit, sf.RewardToGo)
    assert not draws.fx.requires_grad
    assert draws.x.ref_log_prob.tolist() == [[-2.0, 0.0, -3.5, 0.0], [-1.0] * 4]
    token = sequence_draws(logp, torch.full((2, 4), 2.0), mask=mask, ref_logp=ref, kl_weight=0.5)
    assert token.fx.tolist() == [[1.5, 0.0, 1.75, 0.0], [2.0, 2.5, 3.0, 3.5]]


def test_no_weight_leaves_the_reward_alone():
    logp = torch.zeros(2, 2, requires_grad=True)
    draws = sequence_draws(logp, [1, 0], ref_logp=torch.ones(2, 2), kl_weight=0.0)
    assert draws.fx.tolist() == [[1.0], [0.0]]
    assert draws.x.ref_log_prob.tolist() == [[1.0, 1.0]] * 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_floating_dtype(dtype):
    logp = torch.full((4, 3), -0.5, dtype=dtype, requires_grad=True)
    draws = sequence_draws(logp, [True, False, True, True], group=torch.tensor([0, 0, 1, 1], dtype=torch.int8))
    surrogate = sf.surrogate(draws, baseline=sf.LeaveOneOut()).mean()
    surrogate.backward()
    assert surrogate.dtype == dtype
    assert logp.grad.tolist() == [[0.25] * 3, [-0.25] * 3, [0.0] * 3, [0.0] * 3]
    kl_surrogate(logp, torch.full((4, 3), -0.25, dtype=dtype)).sum().backward()
    assert logp.grad.isfinite().all()


def test_draws_are_sliced():
    logp = torch.zeros(4, 3, requires_grad=True)
    draws = sequence_draws(logp, torch.arange(4), ref_logp=torch.zeros(4, 3), kl_weight=1.0)[1:3]
    assert draws.x.reward.tolist() == [1.0, 2.0]
    assert draws.x.ref_log_prob.shape == (2, 3)


def test_gymnasium_is_not_needed():
    program = "import sys, scorefn as sf; sf.trajectories.sequence_draws; assert 'gymnasium' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


# ----------------------------------------------------------------------------------------------------- exact gradients


@pytest.mark.parametrize("off_policy", [False, True])
@pytest.mark.parametrize("kind", ["sequence", "token"])
@pytest.mark.parametrize("kl_weight", [None, 0.7])
def test_the_gradient_is_exact(theta, behaviour, reference, kind, kl_weight, off_policy):
    reward = task.binary_reward() if kind == "sequence" else task.doubles(7, 3, seed=5)[task.context, task.tokens]
    given = reward if kind == "sequence" else spoilt(reward)
    returns = reward if kind == "sequence" else torch.where(T, reward, 0.0).sum(-1)
    draws = sequence_draws(
        spoilt(task.log_prob(theta)), given, mask=T,
        behaviour_logp=spoilt(task.log_prob(behaviour)) if off_policy else None,
        ref_logp=None if kl_weight is None else spoilt(task.log_prob(reference)), kl_weight=kl_weight,
    )  # fmt: skip
    weight = task.probability(behaviour if off_policy else theta).detach()
    objective = (task.probability(theta) * returns).sum() - (kl_weight or 0.0) * divergence(theta, reference)
    estimate = (weight * sf.surrogate(draws)).sum()
    assert near(estimate, objective)
    assert near(task.gradient(estimate, theta), task.gradient(objective, theta))


@pytest.mark.parametrize("off_policy", [False, True])
@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_the_kl_surrogate_has_the_value_and_the_gradient_of_the_kl(theta, behaviour, reference, estimator, off_policy):
    weight = task.probability(behaviour if off_policy else theta).detach()
    truth = divergence(theta, reference)
    off = spoilt(task.log_prob(behaviour)) if off_policy else None
    logp, ref = spoilt(task.log_prob(theta)), spoilt(task.log_prob(reference))
    tensors = kl_surrogate(logp, ref, mask=T, behaviour_logp=off, estimator=estimator)
    draws = sequence_draws(logp, [0.0] * 15, mask=T, behaviour_logp=off, ref_logp=ref, kl_weight=0.0)
    for kl in (tensors, kl_surrogate(draws, estimator=estimator), kl_surrogate(draws, ref, estimator=estimator)):
        assert kl.shape == (15,)
        assert near((weight * kl).sum(), truth)
        assert near(task.gradient((weight * kl).sum(), theta), task.gradient(truth, theta))
    if estimator == "k3":
        assert (tensors >= 0).all()


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_the_kl_surrogate_with_leave_one_out_is_exact_over_all_pairs(theta, reference, estimator):
    pairs = task.coordinates(15, 15)
    weight = task.probability(theta).detach()[pairs].prod(-1)
    each = pairs.flatten()
    kl = kl_surrogate(
        task.log_prob(theta)[each], task.log_prob(reference)[each], mask=T[each],
        group=torch.arange(225).repeat_interleave(2), estimator=estimator, baseline=sf.LeaveOneOut(),
    )  # fmt: skip
    estimate = (weight * kl.reshape(225, 2).mean(-1)).sum()
    truth = divergence(theta, reference)
    assert near(estimate, truth)
    assert near(task.gradient(estimate, theta), task.gradient(truth, theta))


def test_k3_varies_less_than_k1_near_the_reference(theta):
    near_by = theta.detach() + 0.1 * task.doubles(7, 3, seed=8)
    p = task.probability(theta).detach()
    spread = {}
    for estimator in ("k1", "k3"):
        value = kl_surrogate(task.log_prob(theta), task.log_prob(near_by), mask=T, estimator=estimator).detach()
        spread[estimator] = float((p * (value - (p * value).sum()).square()).sum())
    assert spread["k3"] < 0.1 * spread["k1"]


def test_what_is_usually_put_into_the_loss(theta):
    """k1: nothing. k3: each token's other KL. k2 of each token: neither. k2 of the sequence: exact."""
    reference = theta.detach() + 0.3 * task.doubles(7, 3, seed=8)
    p, ratio = task.probability(theta).detach(), log_ratio(theta, reference)
    truth = task.gradient(divergence(theta, reference), theta)
    other = task.gradient((task.probability(reference) * -ratio.sum(-1)).sum(), theta)
    log_pi, log_ref = theta.log_softmax(-1), reference.log_softmax(-1)
    of_context = (log_ref.exp() * (log_ref - log_pi)).sum(-1)  # KL(ref || pi) of the next token
    of_tokens = task.gradient((p * torch.where(T, of_context[task.context], 0.0).sum(-1)).sum(), theta)

    def in_loss(term):
        return task.gradient((p * term).sum(), theta)

    k1, k3 = in_loss(ratio.sum(-1)), in_loss(((-ratio).exp() - 1 + ratio).sum(-1))
    token_k2, sequence_k2 = in_loss(ratio.square().sum(-1) / 2), in_loss(ratio.sum(-1).square() / 2)
    assert near(k1, torch.zeros_like(k1))
    assert near(sequence_k2, truth)
    assert near(k3, of_tokens)
    assert task.cosine(k3, other) > 0.99
    assert (k3 - truth).norm() > 0.05 * truth.norm()
    assert (token_k2 - truth).norm() > 0.02 * truth.norm()


# ------------------------------------------------------------------------------------------------------------ refusals


def call(**changes):
    logp = torch.zeros(3, 4, requires_grad=True)
    return sequence_draws(**({"logp": logp, "reward": torch.zeros(3)} | changes))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"reward": torch.zeros(3, 1)}, sf.ShapeError, r"reward has shape \(3, 1\).*reward.squeeze\(-1\)"),
        ({"reward": torch.zeros(4)}, sf.ShapeError, r"reward has shape \(4,\).*never broadcast"),
        ({"reward": torch.zeros(3, dtype=torch.float64)}, sf.ScorefnError, "reward is torch.float64.*reward.to"),
        ({"reward": torch.tensor([0.0, NAN, 0.0])}, sf.NonFiniteError, r"f is nan at 1 of 3 draws, namely \[1\]"),
        ({"logp": torch.zeros(3, requires_grad=True)}, sf.ShapeError, r"\[N, T\].*shape \(3,\).*gather"),
        ({"logp": [[0.0]]}, sf.ShapeError, "it is a list"),
        ({"logp": torch.zeros(3, 4, dtype=torch.long)}, sf.ScorefnError, "floating-point"),
        ({"logp": torch.zeros(3, 4)}, sf.ScorefnError, "does not require grad"),
        ({"mask": torch.ones(3, 4)}, sf.ScorefnError, r"mask must be bool.*mask.bool\(\)"),
        ({"mask": torch.ones(3, 3, dtype=torch.bool)}, sf.ShapeError, r"mask has shape \(3, 3\).*shift"),
        (
            {"mask": torch.tensor([[True] * 4, [False] * 4, [False] * 4])},
            sf.ScorefnError,
            r"2 of 3 sequences are masked throughout, namely \[1, 2\].*Leave them out",
        ),
        ({"group": torch.zeros(3)}, sf.ScorefnError, "group is torch.float32"),
        ({"group": torch.zeros(3, 1, dtype=torch.long)}, sf.ShapeError, "group has shape"),
        ({"behaviour_logp": torch.zeros(3, 1)}, sf.ShapeError, "behaviour_log_prob has shape"),
        ({"behaviour_logp": torch.zeros(3, 4, requires_grad=True)}, sf.ScorefnError, "detach"),
        ({"ref_logp": torch.zeros(3, 4)}, sf.ScorefnError, "ref_logp was given without kl_weight.*kl_weight=0.0"),
        ({"kl_weight": 0.1}, sf.ScorefnError, "kl_weight was given without ref_logp"),
        ({"ref_logp": torch.zeros(3, 1), "kl_weight": 0.1}, sf.ShapeError, r"ref_logp has shape \(3, 1\)"),
        ({"ref_logp": torch.zeros(3, 4), "kl_weight": -0.1}, sf.ScorefnError, "at least 0"),
        ({"ref_logp": torch.zeros(3, 4), "kl_weight": NAN}, sf.ScorefnError, "at least 0"),
        ({"ref_logp": torch.zeros(3, 4, requires_grad=True), "kl_weight": 1.0}, sf.ScorefnError, "no_grad"),
        ({"ref_logp": torch.zeros(3, 4).double(), "kl_weight": 1.0}, sf.ScorefnError, "ref_logp is torch.float64"),
        (
            {"ref_logp": torch.tensor([[0.0] * 4, [0.0] * 4, [-torch.inf] * 4]), "kl_weight": 1.0},
            sf.NonFiniteError,
            r"ref_logp is -inf at 1 of 3 sequences, namely \[2\].*support",
        ),
    ],
)  # fmt: skip
def test_refusals(changes, error, words):
    with pytest.raises(error, match=words):
        call(**changes)


def test_the_kl_surrogate_refuses():
    logp = torch.zeros(3, 4, requires_grad=True)
    with pytest.raises(sf.ScorefnError, match="needs ref_logp"):
        kl_surrogate(logp)
    with pytest.raises(sf.ScorefnError, match="needs ref_logp"):
        kl_surrogate(call())
    with pytest.raises(sf.ScorefnError, match="'k1' or 'k3', but it is 'k2'"):
        kl_surrogate(logp, torch.zeros(3, 4), estimator="k2")
    with pytest.raises(sf.ScorefnError, match="leave these arguments out"):
        kl_surrogate(call(), torch.zeros(3, 4), mask=torch.ones(3, 4, dtype=torch.bool))
    with pytest.raises(sf.ScorefnError, match="masked throughout"):
        kl_surrogate(logp, torch.zeros(3, 4), mask=torch.zeros(3, 4, dtype=torch.bool))


def test_nothing_is_scored_under_no_grad():
    with torch.no_grad():
        draws = sequence_draws(torch.zeros(3, 4), torch.zeros(3))
    assert not draws.log_prob.requires_grad


@pytest.mark.parametrize("name", ["mask", "group", "behaviour_logp", "ref_logp"])
def test_lists_are_refused_where_a_tensor_is_needed(name):
    logp = torch.zeros(3, 4, requires_grad=True)
    given = {"ref_logp": torch.zeros(3, 4), name: [[1] * 4] * 3}
    words = rf"{name} is a list, but it must be a tensor.*torch.as_tensor\({name}"
    with pytest.raises(sf.ShapeError, match=words):
        sequence_draws(logp, [1, 0, 1], kl_weight=0.1, **given)
    with pytest.raises(sf.ShapeError, match=words):
        kl_surrogate(logp, **given)


@pytest.mark.parametrize("reward", [None, "x", [1, [2, 3], 4], object()], ids=["None", "text", "ragged", "object"])
def test_rewards_that_are_no_numbers_are_refused(reward):
    with pytest.raises(sf.ScorefnError, match=r"reward is .* must be numbers, one per sequence, \(3,\), or one per"):
        sequence_draws(torch.zeros(3, 4, requires_grad=True), reward)


def test_a_weight_of_the_kl_that_is_no_number_is_refused():
    with pytest.raises(sf.ScorefnError, match="kl_weight must be a number of at least 0, but it is 'x'"):
        sequence_draws(torch.zeros(3, 4, requires_grad=True), [1, 0, 1], ref_logp=torch.zeros(3, 4), kl_weight="x")
