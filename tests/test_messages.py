"""Bad input: a typed error that says fact, reason and repair, and that leaves everything as it was.

Each call goes through `expectation` with a baseline that keeps a state; around it, every parameter, every `.grad`, the
baseline and the optimiser are compared bit for bit.
"""

import re
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Bernoulli, Independent, Normal, Uniform

import scorefn as sf

N = 8


def fingerprint(thing):
    """The bits of everything that a call could change."""
    if isinstance(thing, torch.Tensor):
        grad = None if thing.grad_fn is not None else thing.grad
        return (thing.dtype, tuple(thing.shape), thing.detach().numpy().tobytes(), fingerprint(grad))
    if isinstance(thing, nn.Module):
        return (thing.training, fingerprint(dict(thing.named_parameters())), fingerprint(dict(thing.named_buffers())))
    if isinstance(thing, torch.optim.Optimizer):
        return fingerprint(thing.state_dict())
    if isinstance(thing, dict):
        return tuple((key, fingerprint(value)) for key, value in thing.items())
    if isinstance(thing, list | tuple):
        return tuple(fingerprint(value) for value in thing)
    if hasattr(thing, "update") and hasattr(thing, "unbiased"):
        return fingerprint(vars(thing))
    return thing


@dataclass
class World:
    """A measure, a baseline and their optimisers, in the middle of training."""

    baseline: object
    theta: torch.Tensor = field(default_factory=lambda: torch.tensor([0.3, -0.2, 0.1], requires_grad=True))
    module: nn.Module = field(default_factory=lambda: nn.Linear(1, 1))

    def __post_init__(self):
        self.adam = torch.optim.Adam([self.theta], lr=0.1)
        if self.baseline == "ValueFunction":
            optimizer = torch.optim.Adam(self.module.parameters(), lr=0.1)
            self.baseline = sf.ValueFunction(
                self.module, lambda draws: torch.ones_like(draws.log_prob).unsqueeze(-1), optimizer=optimizer
            )
        else:
            self.baseline = sf.MovingAverage(0.9)
        for _ in range(3):  # every state is filled, and the last gradients stand
            self.adam.zero_grad()
            self.expectation(self.p, lambda x: x.sum(-1)).backward()
            self.adam.step()

    @property
    def p(self):
        return Bernoulli(logits=self.theta)

    def expectation(self, p, f, num_samples=N, **options):
        return sf.expectation(p, f, num_samples, **{"baseline": self.baseline} | options)

    def bits(self):
        flags = (torch.get_default_dtype(), torch.is_grad_enabled(), torch.distributions.Distribution._validate_args)
        return (fingerprint([self.theta, self.adam, self.baseline, self.module]), flags)


@pytest.fixture(params=["MovingAverage", "ValueFunction"])
def world(request):
    return World(request.param)


def refuses(world, call, error, *patterns):
    """`call(world)` raises `error` whose text holds every pattern, and nothing has changed."""
    before = world.bits()
    with pytest.raises(error) as caught:
        call(world)
    assert world.bits() == before
    assert type(caught.value) is error
    says(str(caught.value), *patterns)
    return caught.value


def says(text, *patterns):
    for pattern in patterns:
        assert re.search(pattern, text), f"{pattern!r} is not in: {text}"
    assert len(text) > 45, f"too short for a fact, a reason and a repair: {text}"
    assert text.rstrip().endswith("."), text


def test_the_fingerprint_sees_every_change(world):
    """The check above can fail."""
    before = world.bits()
    world.expectation(world.p, lambda x: x.sum(-1))
    assert world.bits() != before  # the baseline learned
    before = world.bits()
    world.expectation(world.p, lambda x: x.sum(-1), baseline=None)
    assert world.bits() == before
    world.theta.grad[0] += 1e-7
    assert world.bits() != before


# ------------------------------------------------------------------------------------------------ what f returns


class Given:
    """A user's measure: p, with one of its two methods replaced."""

    def __init__(self, p, sample=None, log_prob=None):
        self.sample = sample or p.sample
        self.log_prob = log_prob or p.log_prob


def column(p, f):
    return lambda w: w.expectation(p(w), f)


def joint(w):
    return w.p


def single(w):
    return Independent(w.p, 1)


def no_numbers(x):
    return "high"


FUNCTIONS = [
    ("column", joint, lambda x: x.sum(-1, keepdim=True), sf.ShapeError, [r"\(8, 1\)", r"\(8, 3\)", "squeeze"]),
    ("column of one problem", single, lambda x: x[:, :1], sf.ShapeError, [r"\(8, 1\)", r"\(8,\)", "squeeze"]),
    ("scalar", joint, lambda x: x.sum(), sf.ShapeError, [r"shape \(\)", r"\(8, 3\)", r"never over the draws"]),
    ("number", joint, lambda x: 3, sf.ShapeError, [r"shape \(\)", r"\(8, 3\)"]),
    ("wrong batch", joint, lambda x: x[:, :2], sf.ShapeError, [r"\(8, 2\)", r"\(8, 3\)", "Independent"]),
    ("wrong N", joint, lambda x: x.sum(-1)[:4], sf.ShapeError, [r"\(4,\)", r"\(8, 3\)"]),
    ("transposed", joint, lambda x: x.T, sf.ShapeError, [r"\(3, 8\)", r"\(8, 3\)"]),
    ("too many axes", joint, lambda x: x[..., None], sf.ShapeError, [r"\(8, 3, 1\)", r"\(8, 3\)"]),
    ("event kept", single, lambda x: x, sf.ShapeError, [r"\(8, 3\)", r"\(8,\)", "Reduce|Independent"]),
    ("empty", joint, lambda x: torch.zeros(0), sf.ShapeError, [r"\(0,\)", r"\(8, 3\)"]),
    ("string", joint, no_numbers, sf.ScorefnError, ["str", "number"]),
    ("strings", joint, lambda x: ["a"] * N, sf.ScorefnError, ["list", "number"]),
    ("nothing", joint, lambda x: None, sf.ScorefnError, ["NoneType", "number"]),
    ("ragged", joint, lambda x: [[0.0]] * 7 + [[0.0, 1.0]], sf.ScorefnError, ["list", "number"]),
    ("complex", joint, lambda x: x.sum(-1) + 0j, sf.ScorefnError, ["complex64", "float32"]),
    ("float64", joint, lambda x: x.sum(-1).double(), sf.ScorefnError, ["float64", "float32", r"\.to\(|[Cc]onvert"]),
    ("one NaN", joint, lambda x: at([3], torch.nan), sf.NonFiniteError, [r"\bf\b", "nan", "1 of 8", r"\[3\]"]),
    ("infinite", joint, lambda x: at([0, 7], torch.inf), sf.NonFiniteError, ["inf", "2 of 8", r"\[0, 7\]"]),
    ("minus infinite", joint, lambda x: at([5], -torch.inf), sf.NonFiniteError, ["-inf", "1 of 8", r"\[5\]"]),
    ("in place", joint, lambda x: x.mul_(2).sum(-1), sf.ScorefnError, ["in place", "clone"]),
    ("in one place", joint, lambda x: x.index_fill_(0, torch.tensor(0), 1.0)[:, 0], sf.ScorefnError, ["in place"]),
]


def at(places, value, shape=(N,)):
    fx = torch.zeros(shape)
    fx[places] = value
    return fx


@pytest.mark.parametrize(("p", "f", "error", "patterns"), [c[1:] for c in FUNCTIONS], ids=[c[0] for c in FUNCTIONS])
def test_f(world, p, f, error, patterns):
    refuses(world, column(p, f), error, *patterns)


def test_many_bad_draws_are_counted_and_the_first_are_named(world):
    def f(x):
        return at(range(5, 45), torch.nan, (50,))

    error = refuses(world, lambda w: w.expectation(w.p, f, 50), sf.NonFiniteError, "40 of 50", r"\[5, 6, .*14\] \.\.\.")
    assert "15" not in str(error)


def test_a_draw_that_is_bad_in_one_problem_is_named(world):
    def f(x):
        fx = torch.zeros(N, 3)
        fx[2, 1] = torch.inf
        return fx

    world.baseline = None if isinstance(world.baseline, sf.MovingAverage) else world.baseline
    refuses(world, lambda w: w.expectation(w.p, f), sf.NonFiniteError, "inf", "1 of 8", r"\[2\]")


@pytest.mark.parametrize("error", [KeyError("gone"), RuntimeError("diverged"), ZeroDivisionError("division by zero")])
def test_an_error_of_f_is_raised_as_it_is_with_the_shape_of_the_draws_as_a_note(world, error):
    def f(x):
        raise error

    before = world.bits()
    with pytest.raises(type(error)) as caught:
        world.expectation(world.p, f)
    assert world.bits() == before
    assert caught.value is error
    assert any("(8, 3)" in note for note in caught.value.__notes__)


def test_an_interrupt_is_left_alone(world):
    def f(x):
        raise KeyboardInterrupt

    before = world.bits()
    with pytest.raises(KeyboardInterrupt) as caught:
        world.expectation(world.p, f)
    assert world.bits() == before
    assert not getattr(caught.value, "__notes__", [])


@pytest.mark.parametrize(
    "answer",
    [
        lambda x: x.sum(-1).numpy(),
        lambda x: x.sum(-1).numpy().astype(np.float64),
        lambda x: x.sum(-1).tolist(),
        lambda x: tuple(x.sum(-1).tolist()),
        lambda x: x.sum(-1).int(),
        lambda x: x.sum(-1).long().tolist(),
        lambda x: x.sum(-1).to(torch.int8),
        lambda x: [v.sum() for v in x],
    ],
)
def test_numbers_of_any_kind_are_accepted(answer):
    theta = torch.tensor([0.3, -0.2, 0.1], requires_grad=True)

    def gradient(f):
        torch.manual_seed(1)
        value = sf.expectation(Bernoulli(logits=theta), f, N)
        return value.detach(), *torch.autograd.grad(value, theta)

    value, grad = gradient(lambda x: x.sum(-1))
    assert torch.equal(gradient(answer)[0], value)
    assert torch.equal(gradient(answer)[1], grad)


@pytest.mark.parametrize("answer", [lambda x: x[:, 0] > 0, lambda x: (x[:, 0] > 0).tolist()])
def test_bools_are_accepted(answer):
    theta = torch.tensor([0.3], requires_grad=True)
    value = sf.expectation(Bernoulli(logits=theta), answer, N)
    assert value.dtype == torch.float32
    assert torch.autograd.grad(value, theta)[0].isfinite().all()


def test_the_pathwise_part_of_listed_tensors_is_not_lost_silently():
    """`torch.as_tensor` detaches what it copies: either the gradient arrives or the call is refused."""
    theta, c = torch.tensor([0.3], requires_grad=True), torch.tensor(2.0, requires_grad=True)
    try:
        value = sf.expectation(Bernoulli(logits=theta), lambda x: [c * v.sum() + 1 for v in x], N)
    except (sf.ScorefnError, UserWarning):
        return
    assert torch.autograd.grad(value, c)[0] != 0


# ------------------------------------------------------------------------------------------------ the measure

MEASURES = [
    ("object", lambda w: object(), sf.ScorefnError, ["object", "sample", "log_prob"]),
    ("module", lambda w: nn.Linear(1, 1), sf.ScorefnError, ["Linear", "sample", "log_prob"]),
    ("string", lambda w: "Bernoulli", sf.ScorefnError, ["str", "sample", "log_prob"]),
    ("none", lambda w: None, sf.ScorefnError, ["NoneType", "sample", "log_prob"]),
    ("detached", lambda w: Bernoulli(logits=w.theta.detach()), sf.ScorefnError, ["does not require grad", "no_grad"]),
    (
        "rsample",
        lambda w: Given(q := Normal(w.theta, 1.0), sample=q.rsample),
        sf.ScorefnError,
        ["require grad", "pathwise", r"detach|sample\(\)"],
    ),
    (
        "wrong N",
        lambda w: Given(w.p, sample=lambda shape: w.p.sample((3,))),
        sf.ShapeError,
        [r"N = 8", r"\(3, 3\)"],
    ),
    (
        "no N",
        lambda w: Given(w.p, sample=lambda shape: torch.tensor(0.0)),
        sf.ShapeError,
        [r"N = 8", r"\(\)"],
    ),
    (
        "one leaf without N",
        lambda w: Given(w.p, sample=lambda shape: {"a": torch.zeros(8), "b": torch.zeros(3)}),
        sf.ShapeError,
        [r"N = 8", r"\(3,\)"],
    ),
    (
        "impossible draws",
        lambda w: Given(w.p, log_prob=lambda x: w.p.log_prob(x) + at([1, 4], -torch.inf, (N, 3))),
        sf.NonFiniteError,
        ["log_prob", "-inf", "2 of 8", r"\[1, 4\]", "support"],
    ),
    (
        "log_prob without draws",
        lambda w: Given(w.p, log_prob=lambda x: w.p.log_prob(x).sum()),
        sf.ShapeError,
        [r"N = 8|\(8,\)", r"\(\)"],
    ),
    (
        "log_prob of one draw",
        lambda w: Given(w.p, log_prob=lambda x: w.p.log_prob(x).sum()[None]),
        sf.ShapeError,
        [r"N = 8|\(8,\)", r"\(1,\)"],
    ),
    (
        "uniform",
        lambda w: Uniform(w.theta - 1, w.theta + 1),
        sf.SupportError,
        ["Uniform", "boundary", "[Dd]etach", "rsample"],
    ),
]


@pytest.mark.parametrize(("p", "error", "patterns"), [c[1:] for c in MEASURES], ids=[c[0] for c in MEASURES])
def test_measure(world, p, error, patterns):
    measure = p(world)
    refuses(world, lambda w: w.expectation(measure, lambda x: torch.zeros(N)), error, *patterns)


def test_a_detached_measure_is_allowed_under_no_grad(world):
    before = world.bits()
    with torch.no_grad():
        assert world.expectation(Bernoulli(logits=world.theta.detach()), lambda x: x.sum(-1)).ndim == 0
    assert world.bits() == before


@pytest.mark.parametrize("num_samples", [0, -1, 2.0, True, False, None, "8"])
def test_num_samples(world, num_samples):
    refuses(
        world,
        lambda w: w.expectation(w.p, lambda x: x.sum(-1), num_samples),
        sf.ScorefnError,
        "num_samples",
        re.escape(repr(num_samples)),
        "at least 1",
    )


# ------------------------------------------------------------------------------------------------ the options


class OneBlock:
    """A coupling whose draws all share their randomness."""

    unbiased = True

    def sample(self, p, num_samples):
        return p.sample((num_samples,)), torch.zeros(num_samples, dtype=torch.long)


class Shaped:
    """A baseline of any shape."""

    unbiased = True

    def __init__(self, *shape):
        self.shape = shape

    def __call__(self, signal, draws):
        return torch.zeros(self.shape)


OPTIONS = [
    ("leave-one-out at N = 1", {"baseline": sf.LeaveOneOut(), "num_samples": 1}, sf.ScorefnError, ["two", "1"]),
    ("leave-one-out in one block", {"baseline": sf.LeaveOneOut(), "coupling": OneBlock()}, sf.ScorefnError, ["8", "1"]),
    ("unknown baseline", {"baseline": "rloo"}, sf.ScorefnError, ["'rloo'", "auto"]),
    ("reward-to-go", {"credit": sf.RewardToGo()}, sf.ShapeError, ["RewardToGo", "independent problems", "structured"]),
    (
        "influence",
        {"credit": sf.Influence(torch.ones(1, 1, dtype=torch.bool))},
        sf.ShapeError,
        ["Influence", "independent problems"],
    ),
    ("a row of baselines", {"baseline": Shaped(1, 8)}, sf.ShapeError, ["Shaped", r"\(1, 8\)", r"\(8, 1\)"]),
    ("a flat baseline", {"baseline": Shaped(8)}, sf.ShapeError, ["Shaped", r"\(8,\)", r"\(8, 1\)"]),
    ("a scalar baseline", {"baseline": Shaped()}, sf.ShapeError, ["Shaped", r"\(\)", r"\(8, 1\)"]),
    ("a row of constants", {"baseline": sf.Constant(torch.zeros(8))}, sf.ShapeError, [r"\(8,\)", r"\(8, 1\)"]),
    ("too many constants", {"baseline": sf.Constant(torch.zeros(2, 8, 1))}, sf.ShapeError, [r"\(2, 8, 1\)"]),
    (
        "shape spoils fx",
        {"shape": lambda fx: fx / 0.0},
        sf.NonFiniteError,
        ["nan|inf", "of 8"],
    ),
    ("shape changes N", {"shape": lambda fx: fx[:4]}, sf.ShapeError, [r"\(4, 1\)", r"\(8, 1\)"]),
]


@pytest.mark.parametrize(("options", "error", "patterns"), [c[1:] for c in OPTIONS], ids=[c[0] for c in OPTIONS])
def test_options(world, options, error, patterns):
    refuses(world, lambda w: w.expectation(w.p, lambda x: x.sum(-1), **options), error, *patterns)


def test_auto_needs_no_baseline_at_one_block():
    theta = torch.tensor([0.3, -0.2], requires_grad=True)
    for options in [{"num_samples": 1}, {"num_samples": N, "coupling": OneBlock()}]:
        torch.manual_seed(0)
        auto = sf.expectation(Bernoulli(logits=theta), lambda x: x.sum(-1), **options)
        torch.manual_seed(0)
        none = sf.expectation(Bernoulli(logits=theta), lambda x: x.sum(-1), baseline=None, **options)
        assert torch.equal(*(torch.autograd.grad(v, theta)[0] for v in (auto, none)))


def test_a_moving_average_keeps_to_its_problems():
    world = World("MovingAverage")  # it has learned one problem
    refuses(world, lambda w: w.expectation(w.p, lambda x: x), sf.ShapeError, r"\(\)", r"\(3,\)", "new one")


# ------------------------------------------------------------------------------------------------ value functions


def valued(module, features=None, **options):
    optimizer = torch.optim.Adam(module.parameters())
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    return sf.ValueFunction(module, features, optimizer=optimizer, **options)


def ones(draws):
    return torch.ones_like(draws.log_prob).unsqueeze(-1)


class Wrong(nn.Module):
    """A value function of a given shape."""

    def __init__(self, *shape):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.shape = shape

    def forward(self, features):
        return self.weight * torch.ones(self.shape)


@pytest.mark.parametrize("shape", [(), (1, 8), (8,), (8, 2), (3, 8, 1), (8, 1, 1, 1)])
def test_a_value_function_of_the_wrong_shape(shape):
    world = World("MovingAverage")
    world.module = Wrong(*shape)
    world.baseline = valued(world.module, ones)
    wanted = [re.escape(str(shape)), r"\(8, 1\)"]
    refuses(world, lambda w: w.expectation(w.p, lambda x: x.sum(-1)), sf.ShapeError, *wanted)


def test_a_value_function_without_features():
    world = World("MovingAverage")
    world.module = nn.Linear(1, 1)
    world.baseline = valued(world.module)
    refuses(world, lambda w: w.expectation(w.p, lambda x: x.sum(-1)), sf.ScorefnError, "features", "context", "biased")


@pytest.mark.parametrize("shared", ["weight", "trunk", "embedding of logits"])
def test_a_value_function_that_shares_a_parameter(shared):
    world = World("MovingAverage")
    trunk, value, policy = nn.Linear(2, 4), nn.Linear(4, 1), nn.Linear(4, 1)
    observation = torch.ones(2)
    world.module = nn.ModuleList([trunk, value, policy])
    if shared == "weight":
        p = Bernoulli(logits=value(torch.ones(4)))
        baseline = valued(value, lambda draws: torch.ones(*draws.log_prob.shape, 4))
    elif shared == "trunk":
        p = Bernoulli(logits=policy(torch.tanh(trunk(observation))))
        baseline = valued(nn.Sequential(trunk, value), lambda draws: torch.ones(*draws.log_prob.shape, 2))
    else:
        p = Independent(Normal(trunk(observation).exp().log(), 1.0), 1)
        baseline = valued(nn.Sequential(trunk, value), lambda draws: torch.ones(*draws.log_prob.shape, 2))
    world.baseline = baseline
    refuses(
        world,
        lambda w: w.expectation(p, lambda x: x.square().sum(-1)),
        sf.ScorefnError,
        "shares a parameter",
        "of its own",
    )


def test_a_value_function_whose_loss_is_not_a_number():
    world = World("MovingAverage")
    world.module = nn.Linear(1, 1)
    world.baseline = valued(world.module, ones)
    world.expectation(world.p, lambda x: x.sum(-1))
    with torch.no_grad():
        world.module.weight.fill_(torch.nan)
    refuses(world, lambda w: w.expectation(w.p, lambda x: x.sum(-1)), sf.NonFiniteError, "nan", "not stepped")


def test_a_value_function_whose_optimizer_holds_the_measure():
    """Its step would move p, and its zero_grad would drop gradients that are being accumulated."""

    def call(world):
        optimizer = torch.optim.SGD([*world.module.parameters(), world.theta], lr=0.1)
        world.expectation(
            world.p, lambda x: x.sum(-1), baseline=sf.ValueFunction(world.module, ones, optimizer=optimizer)
        )

    refuses(World("MovingAverage"), call, sf.ScorefnError, "optimizer", "own")


# ------------------------------------------------------------------------------------------------ draws by hand


def made(**fields):
    given = {
        "x": torch.zeros(4, 2),
        "log_prob": torch.zeros(4, 2, 3, requires_grad=True),
        "fx": torch.zeros(4, 2, 5),
    }
    return sf.Draws(**given | fields)


FIELDS = [
    ("flat log_prob", {"log_prob": torch.zeros(4, requires_grad=True)}, sf.ShapeError, [r"\(4,\)", r"\[N, \*B, K\]"]),
    ("no draws", {"log_prob": torch.zeros(0, 2, 3, requires_grad=True)}, sf.ShapeError, [r"\(0, 2, 3\)"]),
    ("no decisions", {"log_prob": torch.zeros(4, 2, 0, requires_grad=True)}, sf.ShapeError, [r"\(4, 2, 0\)"]),
    ("fx without J", {"fx": torch.zeros(4, 2)}, sf.ShapeError, [r"\(4, 2\)", r"\(4, 2, 3\)"]),
    ("fx of other problems", {"fx": torch.zeros(4, 1, 5)}, sf.ShapeError, [r"\(4, 1, 5\)", r"\(4, 2, 3\)"]),
    ("fx of other draws", {"fx": torch.zeros(1, 2, 5)}, sf.ShapeError, [r"\(1, 2, 5\)", r"\(4, 2, 3\)"]),
    ("no values", {"fx": torch.zeros(4, 2, 0)}, sf.ShapeError, [r"\(4, 2, 0\)"]),
    ("fx of other precision", {"fx": torch.zeros(4, 2, 5).double()}, sf.ScorefnError, ["float64", "float32"]),
    ("x of other draws", {"x": torch.zeros(3, 2)}, sf.ShapeError, ["N = 4", r"\(3, 2\)"]),
    ("x with grad", {"x": torch.zeros(4, 2, requires_grad=True)}, sf.ScorefnError, ["require grad", "detach"]),
    ("x leaf with grad", {"x": {"a": [torch.zeros(4, requires_grad=True)]}}, sf.ScorefnError, ["require grad"]),
    (
        "log_prob without grad",
        {"log_prob": torch.zeros(4, 2, 3)},
        sf.ScorefnError,
        ["does not require grad", "no_grad"],
    ),
    (
        "behaviour with grad",
        {"behaviour_log_prob": torch.zeros(4, 2, 3, requires_grad=True)},
        sf.ScorefnError,
        ["behaviour_log_prob requires grad", "detach"],
    ),
    (
        "behaviour of other decisions",
        {"behaviour_log_prob": torch.zeros(4, 2, 1)},
        sf.ShapeError,
        ["behaviour_log_prob", r"\(4, 2, 1\)", r"\(4, 2, 3\)"],
    ),
    (
        "behaviour of other precision",
        {"behaviour_log_prob": torch.zeros(4, 2, 3).double()},
        sf.ScorefnError,
        ["behaviour_log_prob", "float64", "float32"],
    ),
    (
        "impossible behaviour",
        {"behaviour_log_prob": torch.full((4, 2, 3), -torch.inf)},
        sf.NonFiniteError,
        ["behaviour_log_prob", "-inf", "4 of 4", "density"],
    ),
    ("float mask", {"mask": torch.ones(4, 2, 3)}, sf.ScorefnError, ["mask", "float32", "bool"]),
    ("int mask", {"mask": torch.ones(4, 2, 3, dtype=torch.int64)}, sf.ScorefnError, ["mask", "int64", "bool"]),
    (
        "flat mask",
        {"mask": torch.ones(4, 2, dtype=torch.bool)},
        sf.ShapeError,
        ["mask", r"\(4, 2\)", r"\(4, 2, 3\)"],
    ),
    ("float block", {"block": torch.zeros(4)}, sf.ScorefnError, ["block", "float32", "int"]),
    ("short block", {"block": torch.zeros(3, dtype=torch.long)}, sf.ShapeError, ["block", r"\(3,\)", r"\(4,\)"]),
    ("wide block", {"block": torch.zeros(4, 2, dtype=torch.long)}, sf.ShapeError, ["block", r"\(4, 2\)", r"\(4,\)"]),
    ("float group", {"group": torch.zeros(4)}, sf.ScorefnError, ["group", "float32", "int"]),
    ("short group", {"group": torch.zeros(3, dtype=torch.long)}, sf.ShapeError, ["group", r"\(3,\)", r"\(4,\)"]),
    ("NaN fx", {"fx": torch.full((4, 2, 5), torch.nan)}, sf.NonFiniteError, ["nan", "4 of 4"]),
    (
        "NaN log_prob",
        {"log_prob": torch.full((4, 2, 3), torch.nan, requires_grad=True)},
        sf.NonFiniteError,
        ["log_prob", "nan", "4 of 4"],
    ),
]


@pytest.mark.parametrize(("fields", "error", "patterns"), [c[1:] for c in FIELDS], ids=[c[0] for c in FIELDS])
def test_draws(fields, error, patterns):
    with pytest.raises(error) as caught:
        made(**fields)
    assert type(caught.value) is error
    says(str(caught.value), *patterns)


def test_opposite_infinities_do_not_cancel():
    fx = torch.zeros(4, 2, 5)
    fx[0, 0, 0], fx[3, 0, 0] = torch.inf, -torch.inf
    with pytest.raises(sf.NonFiniteError, match=r"2 of 4.*\[0, 3\]"):
        made(fx=fx)


def test_values_whose_sum_overflows_are_finite():
    fx = torch.full((4, 2, 5), 3e38)
    assert torch.equal(made(fx=fx).fx, fx)


REDUCERS = [
    (
        "flat influence",
        lambda: sf.Influence(torch.ones(3, dtype=torch.bool)),
        sf.ShapeError,
        [r"\[K, J\]", r"\(3,\)"],
    ),
    ("deep influence", lambda: sf.Influence(torch.ones(1, 3, 5, dtype=torch.bool)), sf.ShapeError, [r"\(1, 3, 5\)"]),
    ("float influence", lambda: sf.Influence(torch.ones(3, 5)), sf.ScorefnError, ["bool", "float32"]),
    *(
        (f"discount {d}", lambda d=d: sf.RewardToGo(d), sf.ScorefnError, ["discount", r"\[0, 1\]", str(d)])
        for d in (-0.1, 1.01, float("nan"), float("inf"))
    ),
    *(
        (f"decay {d}", lambda d=d: sf.MovingAverage(d), sf.ScorefnError, ["decay", r"\[0, 1\)", str(d)])
        for d in (-0.1, 1.0, 1.5, float("nan"))
    ),
    (
        "decay of a recurrence",
        lambda: sf.linear_recurrence(torch.zeros(3, 2), torch.zeros(3, 4)),
        sf.ShapeError,
        [r"\(3, 4\)", r"\(3, 2\)"],
    ),
    (
        "dice with decision weights",
        lambda: sf.dice(made(fx=torch.zeros(4, 2, 3)), credit=sf.RewardToGo(0.9, visitation_discount=False)),
        sf.ScorefnError,
        ["RewardToGo", "derivative", "visitation_discount=True"],
    ),
    ("one draw", lambda: made()[1], sf.ShapeError, [r"draws\[1\]", r"1:2"]),
]


@pytest.mark.parametrize(("call", "error", "patterns"), [c[1:] for c in REDUCERS], ids=[c[0] for c in REDUCERS])
def test_reducers(call, error, patterns):
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    for pattern in patterns:
        assert re.search(pattern, str(caught.value)), str(caught.value)


@pytest.mark.parametrize("integer", [np.int64(1), torch.tensor(1), -1])
def test_any_integer_would_drop_the_axis_of_draws(integer):
    with pytest.raises(sf.ShapeError):
        made()[integer]


def influence(K, J):
    return sf.Influence(torch.ones(K, J, dtype=torch.bool))


@pytest.mark.parametrize("verb", [sf.surrogate, sf.dice])
@pytest.mark.parametrize(
    ("K", "J", "credit"),
    [
        (3, 5, sf.RewardToGo()),
        (3, 1, sf.RewardToGo()),
        (1, 3, sf.RewardToGo()),
        (3, 2, influence(3, 5)),
        (3, 1, influence(3, 2)),
        (4, 2, influence(3, 2)),
        (1, 2, influence(3, 2)),
        (3, 2, influence(1, 2)),
        (3, 3, sf.RewardToGo(done=torch.zeros(4, 2, 2, dtype=torch.bool))),
    ],
)
def test_a_credit_that_does_not_fit_is_refused_never_broadcast(K, J, credit, verb):
    draws = made(log_prob=torch.zeros(4, 2, K, requires_grad=True), fx=torch.ones(4, 2, J))
    with pytest.raises(sf.ShapeError):
        verb(draws, credit=credit)


@pytest.mark.parametrize("verb", [sf.surrogate, sf.dice])
@pytest.mark.parametrize("baseline", [None, sf.Constant(1.0)])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_an_importance_weight_that_overflows(verb, baseline, value):
    draws = made(behaviour_log_prob=torch.full((4, 2, 3), -50.0), fx=torch.full((4, 2, 5), value))
    with pytest.raises(sf.NonFiniteError) as caught:
        verb(draws, baseline=baseline)
    says(str(caught.value), "importance weight", "overflows", "[Ss]ample")


def test_importance_weights_that_vanish_are_allowed():
    draws = made(behaviour_log_prob=torch.full((4, 2, 3), 50.0), fx=torch.ones(4, 2, 5))
    assert torch.equal(sf.surrogate(draws), torch.zeros(4, 2))


# ------------------------------------------------------------------------------------------------ the tree


@pytest.mark.parametrize("error", [sf.ShapeError, sf.SupportError, sf.NonFiniteError])
def test_every_error_is_a_scorefn_error_and_a_value_error(error):
    assert issubclass(error, sf.ScorefnError)
    assert issubclass(sf.ScorefnError, ValueError)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["fx", "behaviour_log_prob", "mask", "block", "group"])
def test_devices_are_never_mixed(name):
    fields = {
        "fx": torch.zeros(4, 2, 5),
        "behaviour_log_prob": torch.zeros(4, 2, 3),
        "mask": torch.ones(4, 2, 3, dtype=torch.bool),
        "block": torch.arange(4),
        "group": torch.arange(4),
    }
    with pytest.raises(sf.ScorefnError, match=r"cuda.*cpu|cpu.*cuda"):
        made(**{name: fields[name].cuda()})


PARTS = {
    "a coupling by name": ({"coupling": "sobol"}, ["coupling='sobol'", "Sobol()"]),
    "the class of a coupling": ({"coupling": sf.Sobol}, ["coupling=Sobol", "Sobol() with parentheses"]),
    "the class of a baseline": ({"baseline": sf.LeaveOneOut}, ["baseline=LeaveOneOut", "LeaveOneOut() with"]),
    "the class of a moving baseline": ({"baseline": sf.MovingAverage}, ["MovingAverage() with parentheses"]),
    "a number as control variate": ({"control_variate": 3}, ["control_variate=3", "LinearControlVariate"]),
    "the class of a control variate": (
        {"control_variate": sf.LinearControlVariate}, ["a control variate is an object", "LinearControlVariate()"],
    ),
    "the class of a shape": ({"shape": sf.CenteredRank}, ["shape=CenteredRank", "CenteredRank() with parentheses"]),
    "a shape by name": ({"shape": "ranks"}, ["shape='ranks'", "CenteredRank()"]),
}  # fmt: skip


@pytest.mark.parametrize(("options", "patterns"), PARTS.values(), ids=PARTS)
def test_parts_that_are_none(options, patterns):
    p = Bernoulli(logits=torch.zeros(2, requires_grad=True))
    with pytest.raises(sf.ScorefnError) as caught:
        sf.expectation(p, lambda x: x, 8, **options)
    for pattern in patterns:
        assert pattern in str(caught.value), caught.value


@pytest.mark.parametrize("credit", [sf.Total, 0.9])
def test_a_credit_that_is_none(credit):
    p = Bernoulli(logits=torch.zeros(2, requires_grad=True))
    with pytest.raises(sf.ScorefnError, match=r"credit=(Total|0\.9).*Total\(\)"):
        sf.surrogate(sf.draw(p, lambda x: x, 8), credit=credit)


@pytest.mark.parametrize("decay", ["x", None, True, torch.ones(2)])
def test_a_decay_that_is_no_number(decay):
    weights = torch.zeros((), requires_grad=True)
    for make in (sf.MovingAverage, sf.AdaptiveRaoBlackwell, lambda decay: sf.BlockConstants([weights], decay)):
        with pytest.raises(sf.ScorefnError, match=r"decay.*a number in \[0, 1\)"):
            make(decay)
