"""ClipUp."""

import math

import pytest
import torch

import scorefn as sf
from scorefn.search import ClipUp

# --- ClipUp ----------------------------------------------------------------------------------------------------------


def test_clip_up_by_hand():
    x = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    optimizer = ClipUp([x], max_speed=1.0, lr=0.8, momentum=0.5)
    x.grad = torch.tensor([3.0, 4.0], dtype=torch.float64)
    optimizer.step()  # v = -.8 (.6, .8)
    torch.testing.assert_close(x.tolist(), [1 - 0.48, 2 - 0.64], rtol=1e-15, atol=0)
    x.grad = torch.tensor([30.0, 40.0], dtype=torch.float64)
    optimizer.step()  # v = (.4 + .8) (-.6, -.8), of length 1.2: clipped to 1
    torch.testing.assert_close(x.tolist(), [1 - 0.48 - 0.6, 2 - 0.64 - 0.8], rtol=1e-14, atol=0)
    x.grad = torch.zeros(2, dtype=torch.float64)
    optimizer.step()  # nothing is added: the velocity halves
    torch.testing.assert_close(x.tolist(), [1 - 0.48 - 0.9, 2 - 0.64 - 1.2], rtol=1e-14, atol=0)


def test_clip_up_leaves_what_has_no_gradient_and_takes_a_closure():
    x, y = torch.ones(2, requires_grad=True), torch.ones(1, requires_grad=True)
    optimizer = ClipUp([x, y], max_speed=0.3)

    def closure():
        optimizer.zero_grad()
        loss = x.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 2
    assert y.item() == 1
    torch.testing.assert_close((x - 1).norm().item(), 0.15, rtol=1e-6, atol=0)
    x.grad = torch.zeros(2)
    fresh = ClipUp([x], max_speed=0.3)
    before = x.detach().clone()
    fresh.step()
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_speed": 0.0}, "max_speed must be a positive number, but it is 0.0|lr"),
        ({"max_speed": math.nan}, "must be a positive number, but it is nan"),
        ({"max_speed": 1.0, "lr": -1.0}, "lr must be a positive number, but it is -1.0"),
        ({"max_speed": 1.0, "momentum": 1.0}, r"momentum must be at least 0 and below 1, but it is 1.0"),
    ],
)
def test_clip_up_refuses_what_cannot_move(options, message):
    with pytest.raises(sf.ScorefnError, match=message):
        ClipUp([torch.ones(1, requires_grad=True)], **options)
