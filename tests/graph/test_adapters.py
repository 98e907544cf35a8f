"""The same model by a graph and by the adapters, at the same draws: the same numbers."""

import gymnasium
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from gymnasium.vector import SyncVectorEnv
from torch import nn
from torch.distributions import Bernoulli, Categorical

import scorefn as sf

pytestmark = pytest.mark.usefixtures("float64")


def grads(value, parameters):
    return torch.cat([part.flatten() for part in torch.autograd.grad(value, parameters, retain_graph=True)])


# --------------------------------------------------------------------------------------- a two-layer sigmoid belief net


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(4)
        shapes = {"a": (3, 4), "b": (4, 2), "prior": (2,), "down": (2, 4), "out": (4, 3)}
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(*shape, generator=generator)))


@pytest.mark.parametrize("baseline", [sf.LeaveOneOut(), None], ids=repr)
def test_posteriors(baseline):
    net, N = Net(), 7
    x = torch.tensor([1.0, 0, 1])
    parameters = list(net.parameters())

    def guide():
        h = pyro.sample("h", dist.Bernoulli(logits=x @ net.a).to_event(1))
        pyro.sample("z", dist.Bernoulli(logits=h @ net.b).to_event(1))

    def model():
        z = pyro.sample("z", dist.Bernoulli(logits=net.prior).to_event(1))
        h = pyro.sample("h", dist.Bernoulli(logits=z @ net.down).to_event(1))
        pyro.sample("x", dist.Bernoulli(logits=h @ net.out).to_event(1), obs=x)

    loss = sf.posteriors.ScoreFunctionELBO(N, baseline=baseline, max_plate_nesting=0, dependencies="tracked")
    torch.manual_seed(11)
    theirs = loss.differentiable_loss(model, guide)

    torch.manual_seed(11)
    with sf.StochasticGraph(N, baseline=baseline) as g:
        h = g.sample("h", Bernoulli(logits=x @ net.a))
        z = g.sample("z", Bernoulli(logits=h @ net.b))
        g.cost("q(h)", g.log_prob("h").detach().sum(-1))
        g.cost("q(z)", g.log_prob("z").detach().sum(-1))
        g.cost("p(z)", -Bernoulli(logits=net.prior).log_prob(z).sum(-1))
        g.cost("p(h)", -Bernoulli(logits=z @ net.down).log_prob(h).sum(-1))
        g.cost("p(x)", -Bernoulli(logits=h @ net.out).log_prob(x).sum(-1))
    ours = g.surrogate().mean()
    assert g.dependencies["q(h)"] == g.dependencies["p(x)"] == ("h",)
    assert abs(float(ours.detach() - theirs.detach())) < 1e-12
    assert (grads(ours, parameters) - grads(theirs, parameters)).abs().max() < 1e-12


# ------------------------------------------------------------------------------------------------------ an environment

REWARD = np.array([[0.3, -1.0], [0.7, 2.0], [-0.4, 0.1]])


class Ring(gymnasium.Env):
    """Three states in a ring, two actions, three steps."""

    observation_space = gymnasium.spaces.Box(0.0, 1.0, (3,), np.float64)
    action_space = gymnasium.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state, self.time = 0, 0
        return np.eye(3)[self.state], {}

    def step(self, action):
        reward, self.state, self.time = REWARD[self.state, action], (self.state + 2 * action + 1) % 3, self.time + 1
        return np.eye(3)[self.state], reward, self.time == 3, False, {}


class Recorded(Categorical):
    """Draws what another run has drawn."""

    def __init__(self, logits, actions):
        super().__init__(logits=logits)
        self.actions = actions

    def sample(self, sample_shape=()):
        return self.actions.expand(self._extended_shape(sample_shape))


@pytest.mark.parametrize("baseline", [sf.LeaveOneOut(), None], ids=repr)
def test_trajectories(baseline):
    N, weight = 6, torch.randn(3, 2, generator=torch.Generator().manual_seed(2)).requires_grad_()

    class Policy(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(weight.detach().clone())

        def forward(self, observations):
            return Categorical(logits=observations @ self.weight)

    policy, reward = Policy(), torch.as_tensor(REWARD)
    tau = sf.trajectories.TrajectoryDistribution(SyncVectorEnv([Ring] * 2), policy)
    torch.manual_seed(3)
    draws = sf.draw(tau, sf.trajectories.rewards, N)

    with sf.StochasticGraph(N, baseline=baseline) as g:
        state = torch.zeros((), dtype=torch.long)  # the same for all draws, until they act
        for t in range(3):
            p = Recorded(torch.eye(3)[state] @ weight, draws.x.actions[:, t])
            action = g.sample(f"action[{t}]", p)
            g.cost(f"reward[{t}]", reward[state, action])
            state = (state + 2 * action + 1) % 3
    assert (g.surrogate() - draws.fx.sum(-1)).abs().max() < 1e-14
    assert g.dependencies == {f"reward[{t}]": tuple(f"action[{s}]" for s in range(t + 1)) for t in range(3)}
    for ours, core in ((g.surrogate(), sf.surrogate), (g.dice(), sf.dice)):
        theirs = core(draws, baseline=baseline).mean()
        found = grads(ours.mean(), [weight]) - grads(theirs, [policy.weight])
        assert found.abs().max() < 1e-12
