"""The front door: the value to the bit, one call of f, updates after the read, nothing global touched."""

from dataclasses import replace

import pytest
import torch
from torch.distributions import Bernoulli, Categorical, Independent, Normal

import scorefn as sf

N = 64


def gradient(value, *parameters):
    return torch.autograd.grad(value, parameters)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("baseline", ["auto", None, sf.LeaveOneOut(), sf.Constant(0.3)])
@pytest.mark.parametrize("batch", [(), (3,), (3, 2)])
def test_the_value_is_the_mean_of_f_to_the_bit(dtype, baseline, batch):
    theta = torch.randn(*batch, 4, dtype=dtype, requires_grad=True)
    seen = []

    def f(x):
        seen.append((x.sin() * 3.3).sum(-1))
        return seen[-1]

    value = sf.expectation(Normal(theta, 1.0), f, N, baseline=baseline)
    assert value.dtype == dtype
    assert value.shape == batch
    assert torch.equal(value.detach(), seen[0].unsqueeze(-1).mean((0, -1)) if batch else seen[0].mean())
    torch.testing.assert_close(value.detach(), seen[0].mean(0))


def test_the_value_of_each_draw_is_f_to_the_bit():
    theta = torch.randn(3, requires_grad=True)
    draws = sf.draw(Normal(theta, 1.0), lambda x: (1e3 * x).sin().sum(-1), N)
    for baseline in [None, sf.LeaveOneOut(), sf.Constant(1e6)]:
        assert torch.equal(sf.surrogate(draws, baseline=baseline), draws.fx[..., 0])
        assert torch.equal(sf.dice(draws, baseline=baseline), draws.fx[..., 0])


@pytest.mark.parametrize("baseline", ["auto", None, sf.MovingAverage()])
def test_f_is_called_exactly_once(baseline):
    calls = []

    def f(x):
        calls.append(x.shape)
        return x.sum(-1)

    theta = torch.zeros(3, requires_grad=True)
    sf.expectation(Bernoulli(logits=theta), f, N, baseline=baseline).backward()
    sf.draw(Bernoulli(logits=theta), f, 5)
    assert calls == [(N, 3), (5, 3)]


@pytest.mark.parametrize(
    ("f", "wanted"),
    [
        (lambda x: x, (2, 3, 4)),
        (lambda x: x.sum(-1), (2, 3)),
        (lambda x: x.sum((-1, -2)), (2,)),
        (lambda x: x.sum((-1, -2, -3)), ()),
    ],
)
def test_batch_dimensions_that_f_drops_are_one_joint_decision(f, wanted):
    theta = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    p = Bernoulli(logits=theta)
    joint = Independent(p, 3 - len(wanted)) if len(wanted) < 3 else p
    found = []
    for measure in (p, joint):
        torch.manual_seed(1)
        draws = sf.draw(measure, f, N)
        assert draws.log_prob.shape == (N, *wanted, 1)
        assert draws.fx.shape == (N, *wanted, 1)
        torch.manual_seed(1)
        value = sf.expectation(measure, f, N)
        assert value.shape == wanted
        found.append(gradient(value.sum(), theta)[0])
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-14)
    assert found[0].abs().min() > 0


def test_independent_problems_do_not_mix():
    """The gradient of one problem sees only its own parameter."""
    theta = torch.randn(3, dtype=torch.float64, requires_grad=True)
    value = sf.expectation(Normal(theta, 1.0), lambda x: x**2, N)
    jacobian = torch.stack([torch.autograd.grad(v, theta, retain_graph=True)[0] for v in value])
    assert torch.equal(jacobian, torch.diag(jacobian.diag()))
    assert (jacobian.diag() != 0).all()


def test_the_pathwise_part_of_f_is_kept():
    theta, c = torch.zeros(2, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    torch.manual_seed(1)
    value = sf.expectation(Bernoulli(logits=theta), lambda x: c * x.sum(-1), N, baseline=None)
    torch.manual_seed(1)
    x = Bernoulli(logits=theta).sample((N,))
    assert torch.equal(gradient(value, c)[0], x.sum(-1).mean())


class Pair:
    """A user's measure whose draws are a pytree."""

    def __init__(self, theta, kind):
        self.a, self.b, self.kind = Bernoulli(logits=theta[0]), Normal(theta[1], 1.0), kind

    def sample(self, shape):
        a, b = self.a.sample(shape), self.b.sample(shape)
        return {"dict": {"a": a, "b": [b]}, "tuple": (a, (b,))}[self.kind]

    def log_prob(self, x):
        a, b = self.leaves(x)
        return self.a.log_prob(a) + self.b.log_prob(b)

    def leaves(self, x):
        return (x["a"], x["b"][0]) if self.kind == "dict" else (x[0], x[1][0])


@pytest.mark.parametrize("kind", ["dict", "tuple"])
def test_draws_may_be_a_pytree(kind):
    theta = torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)
    p = Pair(theta, kind)
    seen = []

    def f(x):
        seen.append(x)
        a, b = p.leaves(x)
        return a * b

    found = gradient(sf.expectation(p, f, N, baseline=sf.Constant(0.0)), theta)[0]
    a, b = p.leaves(seen[0])
    score_a, score_b = a - theta[0].sigmoid(), b - theta[1]
    torch.testing.assert_close(found, torch.stack([(a * b * score_a).mean(), (a * b * score_b).mean()]).detach())

    def spoils(x):
        p.leaves(x)[1].add_(1.0)
        return p.leaves(x)[0]

    with pytest.raises(sf.ScorefnError, match="in place"):
        sf.expectation(p, spoils, N)


class Watch:
    """A baseline that records what is done with it, and in which order."""

    unbiased = True

    def __init__(self):
        self.log = []

    def __call__(self, signal, draws):
        self.log.append("read")
        return torch.zeros_like(signal)

    def update(self, signal, draws):
        self.log.append("update")
        assert not signal.requires_grad
        assert signal.shape == draws.log_prob.shape


def test_a_baseline_is_read_then_updated_once():
    theta, watch = torch.zeros(3, requires_grad=True), Watch()
    sf.expectation(Bernoulli(logits=theta), lambda x: x, N, baseline=watch)
    assert watch.log == ["read", "update"]


def test_nothing_is_updated_without_grad_mode():
    theta, watch = torch.zeros(3, requires_grad=True), Watch()
    with torch.no_grad():
        sf.expectation(Bernoulli(logits=theta), lambda x: x, N, baseline=watch)
    assert "update" not in watch.log


@pytest.mark.parametrize("verb", [sf.surrogate, sf.dice])
def test_surrogates_never_update(verb):
    theta, watch = torch.zeros(3, requires_grad=True), Watch()
    verb(sf.draw(Bernoulli(logits=theta), lambda x: x, N), baseline=watch)
    assert watch.log == ["read"]


def test_a_baseline_is_read_before_it_learns_from_the_same_draws():
    """The first estimate with a moving average is the one without a baseline, to the bit."""
    theta = torch.zeros(3, requires_grad=True)
    found = []
    for baseline in [sf.MovingAverage(), None]:
        torch.manual_seed(1)
        value = sf.expectation(Bernoulli(logits=theta), lambda x: x.sum(-1), N, baseline=baseline)
        found.append(gradient(value, theta)[0])
    assert torch.equal(*found)


def test_auto_is_leave_one_out():
    theta = torch.zeros(3, requires_grad=True)
    found = []
    for options in [{}, {"baseline": "auto"}, {"baseline": sf.LeaveOneOut()}]:
        torch.manual_seed(1)
        value = sf.expectation(Bernoulli(logits=theta), lambda x: x.sum(-1), N, **options)
        found.append(gradient(value, theta)[0])
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_leave_one_out_gives_the_sample_covariance_of_score_and_value():
    theta = torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)
    seen = []

    def f(x):
        seen.append(x)
        return x @ torch.tensor([1.0, 2.0], dtype=torch.float64) + 100.0

    found = gradient(sf.expectation(Bernoulli(logits=theta), f, N), theta)[0]
    x = seen[0]
    score, fx = x - theta.sigmoid().detach(), f(x)
    covariance = ((fx - fx.mean()).unsqueeze(-1) * (score - score.mean(0))).sum(0) / (N - 1)
    torch.testing.assert_close(found, covariance, rtol=1e-11, atol=0.0)


def test_reproducible_from_one_seed():
    theta = torch.randn(4, requires_grad=True)

    def run():
        torch.manual_seed(7)
        value = sf.expectation(Categorical(logits=theta), lambda x: x.float().sqrt(), N)
        return value, gradient(value, theta)[0], torch.rand(())

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


def test_global_state_is_left_alone():
    before = (
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.distributions.Distribution._validate_args,
        torch.are_deterministic_algorithms_enabled(),
        torch.get_num_threads(),
    )
    theta = torch.zeros(3, requires_grad=True)
    for baseline in ["auto", sf.MovingAverage(), None]:
        sf.expectation(Bernoulli(logits=theta), lambda x: x.sum(-1), N, baseline=baseline).backward()
    with pytest.raises(sf.ShapeError):
        sf.expectation(Bernoulli(logits=theta), lambda x: x.sum(), N)
    after = (
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.distributions.Distribution._validate_args,
        torch.are_deterministic_algorithms_enabled(),
        torch.get_num_threads(),
    )
    assert after == before


def test_the_default_dtype_of_the_user_is_not_needed(float64):
    theta = torch.zeros(3, dtype=torch.float32, requires_grad=True)
    value = sf.expectation(Bernoulli(logits=theta), lambda x: x.sum(-1), N, baseline=sf.MovingAverage())
    assert value.dtype == torch.float32
    assert gradient(value, theta)[0].dtype == torch.float32


def test_under_no_grad_and_inference_mode_there_is_a_value():
    theta = torch.zeros(3, requires_grad=True)
    for mode in [torch.no_grad, torch.inference_mode]:
        with mode():
            value = sf.expectation(Bernoulli(logits=theta), lambda x: x.sum(-1), N)
        assert 0.0 < value < 3.0
        assert not value.requires_grad


def test_shape_transforms_all_values_at_once():
    theta = torch.zeros(3, requires_grad=True)
    seen = []

    def shape(fx):
        seen.append(fx.shape)
        return (fx - fx.mean(0)) / fx.std(0)

    value = sf.expectation(Bernoulli(logits=theta), lambda x: x.sum(-1), N, shape=shape)
    assert seen == [(N, 1)]
    assert value.detach().abs() < 1e-6


def test_a_control_variate_comes_before_the_credit():
    theta = torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)

    def perfect(draws):
        return replace(draws, fx=draws.fx - draws.x.sum(-1, keepdim=True) + theta.sigmoid().sum())

    p = Bernoulli(logits=theta)
    value = sf.expectation(p, lambda x: x.sum(-1), 4, control_variate=perfect)
    right = theta.sigmoid().sum()
    torch.testing.assert_close(value, right, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(gradient(value, theta)[0], gradient(right, theta)[0], rtol=1e-12, atol=1e-15)


class Structured:
    """A measure that makes its own draws."""

    def __init__(self, theta):
        self.theta, self.calls = theta, []

    def draws(self, f, num_samples, *, coupling=None):
        self.calls.append((num_samples, coupling))
        x = torch.arange(float(num_samples))
        log_prob = (self.theta * x.unsqueeze(-1)).expand(num_samples, 3)
        return sf.Draws(x, log_prob, f(x), credit=sf.RewardToGo())


def test_a_structured_measure_makes_its_own_draws():
    theta = torch.tensor(0.5, requires_grad=True)
    tau, coupling = Structured(theta), object()
    fx = torch.tensor([[1.0, 10.0, 100.0]]).expand(4, 3)
    value = sf.expectation(tau, lambda x: fx, 4, coupling=coupling, baseline=None)
    assert tau.calls == [(4, coupling)]
    assert value.item() == 111.0
    # x = 0..3, signal (111, 110, 100) at every draw, score x at every decision
    assert float(gradient(value, theta)[0]) == pytest.approx(1.5 * 321)
    total = sf.expectation(tau, lambda x: fx, 4, credit=sf.Total(), baseline=None)
    assert float(gradient(total, theta)[0]) == pytest.approx(1.5 * 333)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("baseline", ["auto", None, sf.Constant(1.0), "MovingAverage", "ValueFunction"])
def test_cuda(baseline):
    theta = torch.randn(2, 3, device="cuda", requires_grad=True)
    if baseline == "MovingAverage":
        baseline = sf.MovingAverage()
    if baseline == "ValueFunction":
        module = torch.nn.Linear(1, 1, device="cuda")
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        baseline = sf.ValueFunction(module, lambda d: torch.ones_like(d.log_prob)[..., None], optimizer=optimizer)
    for f in [lambda x: x.sum(-1), lambda x: x.sum(-1).tolist(), lambda x: x.sum(-1) > 1]:
        value = sf.expectation(Bernoulli(logits=theta), f, N, baseline=baseline)
        assert value.device == theta.device
        assert gradient(value.sum(), theta)[0].isfinite().all()
    with pytest.raises(sf.ScorefnError, match="cuda"):
        sf.expectation(Bernoulli(logits=theta), lambda x: x.sum(-1).cpu(), N, baseline=baseline)
