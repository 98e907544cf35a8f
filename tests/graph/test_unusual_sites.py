"""Sites whose distribution or estimator answers something else than it should, and those that no cost depends on."""

import pytest
import torch
from torch.distributions import Bernoulli

import scorefn as sf
from tests.graph.test_refusals import program

LOGITS = torch.tensor([0.3, -0.4], requires_grad=True)


class Other(Bernoulli):
    """A coin of which one answer is changed."""

    def __init__(self, **answers):
        super().__init__(logits=LOGITS)
        self.answers = answers

    def sample(self, shape=torch.Size()):  # noqa: B008 - as torch has it
        return self.answers.get("sample", lambda x: x)(super().sample(shape))

    def log_prob(self, value):
        return self.answers.get("log_prob", lambda x: x)(super().log_prob(value))


@pytest.mark.parametrize(
    ("answers", "error", "message"),
    [
        ({"sample": lambda x: (x, x)}, sf.ScorefnError, "^Site 'z' drew a tuple, and only tensors can be followed"),
        ({"sample": lambda x: x + LOGITS}, sf.ScorefnError, "^The draws of site 'z' require grad: .*as well as"),
        (
            {"log_prob": lambda x: x.sum(0)},
            sf.ShapeError,
            r"^The log_prob of site 'z' is \(2,\) for draws of shape \(4",
        ),
        ({"log_prob": lambda x: 0.5}, sf.ShapeError, "^The log_prob of site 'z' is float for draws of shape"),
    ],
)
def test_a_distribution_that_answers_something_else(answers, error, message):
    with pytest.raises(error, match=message):
        program(lambda g: g.cost("c", g.sample("z", Other(**answers)).sum(-1)))


class Wide(sf.DisARM):
    """A surrogate for each draw, where one for each problem is needed."""

    def surrogate(self, p, x, fx):
        return super().surrogate(p, x, fx).expand(7)


def test_an_estimator_that_answers_in_another_shape():
    def body(g):
        g.cost(
            "c", g.sample("z", torch.distributions.Independent(Bernoulli(logits=LOGITS), 1), estimator=Wide()).sum(-1)
        )

    with pytest.raises(sf.ShapeError, match=r"^Wide returned a surrogate of shape .*7\) for site 'z', but .*\(4,\)"):
        program(body)


@pytest.mark.usefixtures("float64")
def test_a_site_of_an_estimator_that_no_cost_depends_on_has_no_gradient():
    other = torch.zeros(2, requires_grad=True)
    theta = torch.tensor([0.3, -0.4], requires_grad=True)

    def body(g):
        g.sample("idle", torch.distributions.Independent(Bernoulli(logits=other), 1), estimator=sf.DisARM())
        g.cost(
            "c",
            g.sample("z", torch.distributions.Independent(Bernoulli(logits=theta), 1), estimator=sf.Enumerate()).sum(
                -1
            ),
        )

    gradients = torch.autograd.grad(program(body, N=3).mean(), (theta, other), materialize_grads=True)
    (wanted,) = torch.autograd.grad(theta.sigmoid().sum(), theta)
    torch.testing.assert_close(gradients[0], wanted, rtol=0, atol=1e-15)
    assert not gradients[1].any()


def test_costs_in_whole_numbers_are_those_in_real_ones():
    coin = torch.distributions.Independent(Bernoulli(logits=LOGITS), 1)

    def of(cost):
        return program(lambda g: g.cost("c", cost(g.sample("z", coin, estimator=sf.Enumerate()))), N=3)

    whole, real = of(lambda z: z.sum(-1).long()), of(lambda z: z.sum(-1))
    assert torch.equal(whole, real)
    first, second = (torch.autograd.grad(v.mean(), LOGITS)[0] for v in (whole, real))
    assert torch.equal(first, second)
