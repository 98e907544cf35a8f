"""A gradient attached to a value: shapes, bits, infinite parameters, and inside a transform."""

import torch

import scorefn as sf
from scorefn.estimators.gradient import with_gradient


def test_value_and_gradients():
    inner = torch.tensor([1.0, -2.0], requires_grad=True)
    parameter = torch.tensor([[0.5, torch.inf, 3.0], [-torch.inf, 1.0, 2.0]], requires_grad=True)
    gradient = torch.arange(6.0).reshape(2, 3)
    value = with_gradient(3 * inner, parameter, gradient)
    assert torch.equal(value, 3 * inner)
    to_inner, to_parameter = torch.autograd.grad(value, (inner, parameter), torch.tensor([1.0, 10.0]))
    assert torch.equal(to_inner, torch.tensor([3.0, 30.0]))
    assert torch.equal(to_parameter, gradient * torch.tensor([[1.0], [10.0]]))


def test_inside_a_transform():
    logits = torch.tensor([0.3, -0.8, 1.2], dtype=torch.float64)

    def estimate(logits):
        p = torch.distributions.Bernoulli(logits=logits, validate_args=False)
        x = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
        return sf.DisARM().surrogate(p, x, x.prod(-1) + x.sum(-1))

    ours = torch.func.grad(estimate)(logits)
    assert torch.equal(ours, torch.autograd.functional.jacobian(estimate, logits))
    assert ours.any()
