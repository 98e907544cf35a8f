"""Policies: the fast path samples the distribution that is scored, and that is the one of torch and SciPy."""

import itertools

import gymnasium
import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.distributions import Bernoulli, Categorical, Independent, Normal

import scorefn as sf
from scorefn.trajectories import (
    BernoulliPolicy,
    CategoricalPolicy,
    Clip,
    GaussianPolicy,
    MultiCategoricalPolicy,
    Tanh,
)


class Logits(nn.Module):
    def __init__(self, *logits):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, observations):
        return self.logits.expand(*observations.shape[:-1], -1)


def gaussian(**parts):
    return GaussianPolicy(nn.Linear(4, 2), torch.tensor([0.3, -1.0]), **parts)


POLICIES = {
    "categorical": (lambda: CategoricalPolicy(nn.Linear(4, 3)), ()),
    "multicategorical": (lambda: MultiCategoricalPolicy(nn.Linear(4, 5), np.array([3, 2])), (2,)),
    "bernoulli": (lambda: BernoulliPolicy(nn.Linear(4, 3)), (3,)),
    "gaussian": (gaussian, (2,)),
    "gaussian of a state-dependent scale": (lambda: GaussianPolicy(nn.Linear(4, 2), nn.Linear(4, 2)), (2,)),
    "gaussian with a trunk": (
        lambda: GaussianPolicy(nn.Linear(8, 2), nn.Linear(8, 2), trunk=nn.Sequential(nn.Linear(4, 8), nn.Tanh())),
        (2,),
    ),
    "clipped gaussian": (lambda: gaussian(bounds=Clip([-1.0, 0.0], [1.0, 1.0])), (2,)),
    "squashed gaussian": (lambda: gaussian(bounds=Tanh([-1.0, 0.0], [1.0, 1.0])), (2,)),
    "gaussian of one number": (
        lambda: GaussianPolicy(nn.Sequential(nn.Linear(4, 1), nn.Flatten(-2)), 0.5, bounds=Clip(-1.0, 1.0)),
        (),
    ),
    "gaussian of a matrix": (
        lambda: GaussianPolicy(nn.Sequential(nn.Linear(4, 6), nn.Unflatten(-1, (2, 3))), torch.zeros(2, 3)),
        (2, 3),
    ),
}
VECTORS = [name for name in POLICIES if name != "gaussian of one number"]  # nn.Flatten joins its batch dimensions


@pytest.mark.parametrize("batch", [(), (7,), (7, 5)])
@pytest.mark.parametrize("name", VECTORS)
def test_shapes(name, batch):
    make, action = POLICIES[name]
    policy, x = make(), torch.randn(*batch, 4)
    p = policy(x)
    assert p.batch_shape == batch
    assert p.event_shape == action
    acted = policy.act(x)
    assert acted.shape == (*batch, *action)
    assert p.log_prob(acted).shape == batch
    assert p.entropy().shape == batch
    assert p.mode.shape == (*batch, *action)
    assert p.support.check(acted).all()


@pytest.mark.parametrize("name", POLICIES)
def test_act_neither_tracks_gradients_nor_changes_anything(name):
    policy = POLICIES[name][0]()
    before = {key: value.clone() for key, value in policy.state_dict().items()}
    acted = policy.act(torch.randn(6, 4))
    assert not acted.requires_grad
    assert acted.shape[0] == 6
    assert acted.dtype == policy(torch.randn(6, 4)).sample().dtype
    assert all(torch.equal(before[key], value) for key, value in policy.state_dict().items())


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "categorical"])
def test_act_is_the_very_draw_of_the_distribution(name):
    policy, x = POLICIES[name][0](), torch.randn(50, 4)
    torch.manual_seed(1)
    acted = policy.act(x)
    torch.manual_seed(1)
    assert torch.equal(acted, policy(x).sample())


@pytest.mark.parametrize("name", POLICIES)
def test_every_parameter_is_learned(name):
    policy, x = POLICIES[name][0](), torch.randn(6, 4)
    policy(x).log_prob(policy.act(x)).sum().backward()
    assert all(parameter.grad is not None for parameter in policy.parameters())


# ------------------------------------------------------------------------------------------------------- categorical


def test_act_samples_the_distribution_that_forward_returns():
    """A million draws: a frequency off by 0.005 is ten standard errors, so false alarms are below 1e-6."""
    policy = CategoricalPolicy(Logits(0.3, -1.2, 5.0, 4.1, -torch.inf))
    observations = torch.zeros(1_000_000, 1)
    frequency = torch.bincount(policy.act(observations), minlength=5) / 1_000_000
    probability = policy(observations[0]).probs
    assert (frequency - probability).abs().max() < 0.005
    assert frequency[-1] == 0  # an action that is ruled out is never taken


def test_the_random_numbers_of_act_are_one_exponential_for_each_logit():
    policy, x = CategoricalPolicy(nn.Linear(4, 3)), torch.randn(20, 4)
    torch.manual_seed(3)
    clocks = torch.empty(20, 3).exponential_()
    torch.manual_seed(3)
    assert torch.equal(policy.act(x), (clocks / policy.network(x).exp()).argmin(-1))


def test_one_action_only():
    assert CategoricalPolicy(Logits(2.0)).act(torch.zeros(3, 1)).tolist() == [0, 0, 0]


def test_forward_is_the_categorical_of_the_logits():
    policy = CategoricalPolicy(nn.Linear(2, 3))
    x = torch.randn(4, 5, 2)
    distribution = policy(x)
    assert isinstance(distribution, Categorical)
    assert distribution.batch_shape == (4, 5)
    assert torch.allclose(distribution.logits, policy.network(x).log_softmax(-1))


# --------------------------------------------------------------------------------------------------------- bernoulli


def test_bernoulli_is_torch_and_its_score_has_mean_zero(float64):
    policy, x = BernoulliPolicy(nn.Linear(4, 3)), torch.randn(1, 4)
    values = torch.tensor(list(itertools.product([0.0, 1.0], repeat=3))).unsqueeze(1)
    log_prob = policy(x).log_prob(values).squeeze(1)
    logits = policy.network(x)
    by_hand = (values * logits - nn.functional.softplus(logits)).sum((1, 2))
    assert (log_prob - by_hand).abs().max() < 1e-14
    assert (log_prob - Independent(Bernoulli(logits=logits), 1).log_prob(values).squeeze(1)).abs().max() == 0
    probability = log_prob.detach().exp()
    assert abs(probability.sum().item() - 1) < 1e-14
    for gradient in torch.autograd.grad(probability @ log_prob, list(policy.parameters())):
        assert gradient.abs().max() < 1e-14


# ---------------------------------------------------------------------------------------------------------- gaussian


@pytest.mark.parametrize("name", ["gaussian", "gaussian of a state-dependent scale", "gaussian with a trunk"])
def test_gaussian_is_torch_and_scipy(name, float64):
    policy, x, u = POLICIES[name][0](), torch.randn(5, 4), torch.randn(5, 2)
    hidden = x if policy.trunk is None else policy.trunk(x)
    mean = policy.mean(hidden)
    log_scale = policy.log_scale(hidden) if isinstance(policy.log_scale, nn.Module) else policy.log_scale
    log_prob = policy(x).log_prob(u)
    assert torch.equal(log_prob, Independent(Normal(mean, log_scale.exp()), 1).log_prob(u))
    scipys = stats.norm(mean.detach().numpy(), log_scale.exp().detach().numpy()).logpdf(u.numpy()).sum(-1)
    assert np.abs(log_prob.detach().numpy() - scipys).max() < 1e-12
    assert torch.equal(policy.executed_log_prob(x, u), log_prob)
    assert policy.executed(u) is u


def test_gaussian_score_has_mean_zero_by_quadrature(float64):
    for log_scale in (torch.tensor([0.3]), nn.Linear(2, 1)):
        policy, x = GaussianPolicy(nn.Linear(2, 1), log_scale), torch.randn(1, 2)
        node, weight = map(torch.from_numpy, np.polynomial.hermite_e.hermegauss(20))
        normal = policy(x).base_dist
        u = (normal.loc + normal.scale * node.unsqueeze(-1)).detach().unsqueeze(-1)
        weighted = (weight / weight.sum()) @ policy(x).log_prob(u).squeeze(-1)
        for gradient in torch.autograd.grad(weighted, list(policy.parameters())):
            assert gradient.abs().max() < 1e-13


def test_the_scale_is_one_parameter_or_a_module():
    policy = GaussianPolicy(nn.Linear(4, 2), [0, -1])
    assert isinstance(policy.log_scale, nn.Parameter)
    assert policy.log_scale.tolist() == [0.0, -1.0]
    assert set(policy.state_dict()) == {"log_scale", "mean.weight", "mean.bias"}
    start = torch.zeros(2)
    policy = GaussianPolicy(nn.Linear(4, 2).double(), start)
    assert policy.log_scale.dtype == torch.float64
    GaussianPolicy(nn.Linear(4, 2), start).log_scale.data.add_(1.0)
    assert not start.any()  # a copy
    own = nn.Parameter(torch.zeros(2))
    assert GaussianPolicy(nn.Linear(4, 2), own).log_scale is own
    assert GaussianPolicy(nn.Linear(4, 2), np.zeros(2)).log_scale.dtype == torch.float32
    module = nn.Linear(4, 2)
    assert GaussianPolicy(nn.Linear(4, 2), module).log_scale is module


def test_the_trunk_is_computed_once():
    policy, calls = POLICIES["gaussian with a trunk"][0](), []
    policy.trunk.register_forward_hook(lambda *_: calls.append(1))
    policy.act(torch.zeros(3, 4))
    policy(torch.zeros(3, 4))
    assert len(calls) == 2


def test_bounds_move_with_the_policy():
    policy = gaussian(bounds=Clip([-1.0, 0.0], [1.0, 1.0])).double()
    assert policy.bounds.low.dtype == torch.float64
    assert set(policy.state_dict()) == {"log_scale", "mean.weight", "mean.bias"}


@pytest.mark.parametrize("kind", [Clip, Tanh])
def test_float64_bounds_beside_a_float32_policy_leave_the_log_probability_in_float32(kind):
    policy = gaussian(bounds=kind(np.array([-1.0, 0.0]), np.array([1.0, 1.0])))
    x = torch.randn(3, 4)
    assert policy.executed_log_prob(x, policy.act(x)).dtype == torch.float32


def test_dict_observations_reach_the_network_as_they_are():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = nn.Linear(4, 2)

        def forward(self, observations):
            return self.network(torch.cat([observations["a"], observations["b"]], -1))

    seen = {"a": torch.zeros(3, 1), "b": torch.zeros(3, 3)}
    assert CategoricalPolicy(Both()).act(seen).shape == (3,)
    assert GaussianPolicy(Both(), torch.zeros(2))(seen).batch_shape == (3,)


def test_from_the_space_of_an_environment():
    env = gymnasium.make_vec("Pendulum-v1", num_envs=2, vectorization_mode="sync")
    policy = GaussianPolicy(nn.Linear(3, 1), torch.zeros(1), bounds=Tanh.from_space(env.single_action_space))
    given = policy.executed(policy.act(torch.randn(2, 3) * 100))
    assert env.action_space.contains(given.numpy())


# --------------------------------------------------------------------------------------------------------- refusals


def test_log_scale_that_is_neither_numbers_nor_a_module_is_refused():
    with pytest.raises(sf.ScorefnError, match=r"log_scale is str, but .* a module, or numbers.*torch.zeros\(2\)"):
        GaussianPolicy(nn.Linear(4, 2), "learned")


def test_bounds_of_another_kind_are_refused():
    with pytest.raises(sf.ScorefnError, match=r"bounds is tuple, but how .* bounded.*Clip.from_space\(space\)"):
        gaussian(bounds=(-1.0, 1.0))


def test_bounds_of_another_shape_are_refused():
    with pytest.raises(sf.ShapeError, match=r"log_scale has shape \(2,\), but the bounds are .* shape \(3,\)"):
        gaussian(bounds=Clip([-1.0] * 3, [1.0] * 3))


@pytest.mark.parametrize("call", ["forward", "act"])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: GaussianPolicy(nn.Linear(4, 3), torch.zeros(2)),
            r"mean returned shape \(5, 3\), but .* actions of shape \(2,\)",
        ),
        (
            lambda: GaussianPolicy(nn.Linear(4, 1), torch.zeros(2)),
            r"mean returned shape \(5, 1\), but .* actions of shape \(2,\)",
        ),
        (
            lambda: GaussianPolicy(nn.Linear(4, 2), nn.Linear(4, 1)),
            r"log_scale returned shape \(5, 1\) and mean shape \(5, 2\).*one scale for each mean",
        ),
        (
            lambda: GaussianPolicy(nn.Linear(4, 2), nn.Linear(4, 2), bounds=Tanh([0.0], [1.0])),
            r"mean returned shape \(5, 2\), but .* actions of shape \(1,\)",
        ),
        (
            lambda: MultiCategoricalPolicy(nn.Linear(4, 4), [3, 2]),
            r"logits have shape \(5, 4\), but choices among \[3, 2\] values need \[\*batch, 5\]",
        ),
    ],
)
def test_networks_of_another_shape_are_refused(make, message, call):
    with pytest.raises(sf.ShapeError, match=message):
        getattr(make(), call)(torch.zeros(5, 4))


def test_a_network_that_returns_a_number_is_refused():
    class Sum(nn.Module):
        def forward(self, observations):
            return observations.sum()

    with pytest.raises(sf.ShapeError, match=r"network returned shape \(\).*\[\*batch, D\]"):
        BernoulliPolicy(Sum())(torch.zeros(4))
    with pytest.raises(sf.ShapeError, match=r"mean returned shape \(\).*one dimension of actions at least"):
        GaussianPolicy(Sum(), Sum())(torch.zeros(4))


@pytest.mark.parametrize("wrong", [(5,), (5, 1), (1, 2), (2,), (5, 5, 2)])
@pytest.mark.parametrize("bounds", [None, Clip([-1.0, 0.0], [1.0, 1.0]), Tanh([-1.0, 0.0], [1.0, 1.0])])
def test_executed_actions_are_never_broadcast(wrong, bounds):
    with pytest.raises(sf.ShapeError, match=r"actions have shape .*\[\*batch, \*act\] = \(5, 2\)"):
        gaussian(bounds=bounds).executed_log_prob(torch.zeros(5, 4), torch.zeros(wrong))
