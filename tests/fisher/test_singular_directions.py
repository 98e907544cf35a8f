"""An information without a solution is refused, whichever check of conjugate gradients sees it."""

import pytest
import torch

import scorefn as sf
from scorefn.fisher.solvers import Scores, sample_weight
from tests.fisher.cases import refused

pytestmark = pytest.mark.usefixtures("float64")


def linear(A):
    """Scores A of a linear log-probability."""
    theta = torch.zeros(A.shape[1], requires_grad=True)
    return Scores(A @ theta, (theta,), torch.ones(len(A)))


def test_a_parameter_that_moves_no_score():
    A = torch.randn(6, 3)
    A[:, 1] = 0
    refused(
        lambda: sf.ConjugateGradients()(linear(A), torch.ones(3), 0.0), "singular", "6 draw(s) in 3", "damping=1e-3"
    )


def test_a_gradient_along_a_direction_that_moves_no_score():
    """With a number of iterations given, the information is not looked at before: the first step divides by 0."""
    solver = sf.ConjugateGradients(max_iterations=5)
    A = torch.tensor([[1.0, 1.0], [2.0, 2.0], [-1.0, -1.0]])
    refused(lambda: solver(linear(A), torch.tensor([1.0, -1.0]), 0.0), "singular", "3 draw(s) in 2", "damping=1e-3")
    solved = solver(linear(A), torch.tensor([3.0, 3.0]), 0.0)  # of the span: F = 6/3 [[1, 1], [1, 1]] if averaged
    image = linear(A).transposed(linear(A).times(solved))
    torch.testing.assert_close(image, torch.tensor([3.0, 3.0]), rtol=0, atol=1e-12)


def test_an_importance_weight_that_overflows_has_no_information():
    weight = sample_weight(torch.tensor([[0.5, 1.0], [-2.0, 0.0]]), torch.tensor([[0.0, 1.0], [-2.0, 1.0]]))
    torch.testing.assert_close(weight, torch.tensor([0.5, -1.0]).exp(), rtol=0, atol=1e-15)
    with pytest.raises(sf.NonFiniteError, match="importance weight of the Fisher information overflows.*sample afresh"):
        sample_weight(torch.tensor([[0.0], [0.0]]), torch.tensor([[0.0], [-1830.0]]))
