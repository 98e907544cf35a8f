"""The log-step scan against a loop: values, gradients, every axis, zeros in the decay."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import scorefn as sf


def loop(x, decay, reverse, dim):
    """y_t = x_t + decay_t y_(t-1), one step after the other."""
    x, decay = x.movedim(dim, 0), torch.as_tensor(decay, dtype=x.dtype).expand(x.shape).movedim(dim, 0)
    order = range(len(x) - 1, -1, -1) if reverse else range(len(x))
    y, running = [None] * len(x), None
    for t in order:
        running = x[t] if running is None else x[t] + decay[t] * running
        y[t] = running
    return torch.stack(y).movedim(0, dim)


@given(
    steps=st.integers(1, 20),
    lead=st.sampled_from([(), (3,), (2, 3)]),
    place=st.integers(0, 2),
    kind=st.sampled_from(["number", "one", "zero", "int", "scalar", "full", "row", "cut"]),
    reverse=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_the_scan_is_the_loop(steps, lead, place, kind, reverse, seed):
    generator = torch.Generator().manual_seed(seed)
    place = min(place, len(lead))
    shape = (*lead[:place], steps, *lead[place:])
    x = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
    full = torch.randn(shape, generator=generator, dtype=torch.float64)
    decay = {
        "number": 0.7,
        "one": 1.0,
        "zero": 0.0,
        "int": 1,
        "scalar": torch.tensor(-0.6, dtype=torch.float64),
        "full": full,
        "row": full.movedim(place, 0).reshape(steps, -1)[:, 0].reshape(steps, *[1] * (len(shape) - 1 - place)),
        "cut": torch.where(full > 0, 0.0, 1.5),
    }[kind]
    for dim in (place, place - len(shape)):
        found = sf.linear_recurrence(x, decay, reverse=reverse, dim=dim)
        right = loop(x, decay, reverse, dim)
        torch.testing.assert_close(found, right, rtol=1e-10, atol=1e-10)
        u = torch.randn(shape, generator=generator, dtype=torch.float64)
        torch.testing.assert_close(
            torch.autograd.grad(found, x, u)[0], torch.autograd.grad(right, x, u)[0], rtol=1e-10, atol=1e-10
        )


@pytest.mark.parametrize("reverse", [False, True])
def test_gradients_of_both_arguments_to_the_second_order(reverse):
    x = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    decay = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)

    def scan(x, decay):
        return sf.linear_recurrence(x, decay, reverse=reverse, dim=1)

    assert torch.autograd.gradcheck(scan, (x, decay))
    assert torch.autograd.gradgradcheck(scan, (x, decay))


def test_a_decay_of_zero_cuts():
    """Nothing is divided, so nothing is made infinite."""
    x = torch.tensor([1.0, 2.0, 4.0, 8.0])
    found = sf.linear_recurrence(x, torch.tensor([1.0, 1.0, 0.0, 1.0]))
    assert found.tolist() == [1.0, 3.0, 4.0, 12.0]


def test_the_inputs_stay_and_the_dtype_is_kept():
    for dtype in (torch.float32, torch.float64):
        x, decay = torch.randn(6, dtype=dtype), torch.rand(6, dtype=dtype)
        kept = x.clone(), decay.clone()
        for chosen in (decay, 0.5, 1.0):
            y = sf.linear_recurrence(x, chosen)
            assert y.dtype == dtype
            y.zero_()
        assert torch.equal(x, kept[0])
        assert torch.equal(decay, kept[1])


def test_time_is_the_first_axis_unless_told():
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert torch.equal(sf.linear_recurrence(x, 0.5), torch.tensor([[1.0, 2.0], [3.5, 5.0]]))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("decay", [0.5, 1.0, torch.tensor([0.5])])
def test_one_step_is_a_copy(decay, reverse):
    x = torch.ones(1)
    y = sf.linear_recurrence(x, decay, reverse=reverse)
    assert torch.equal(y, x)
    assert y.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("decay", [2, 2.0, -1.0])
def test_a_number_that_does_not_decay(decay):
    x = torch.tensor([1.0, 2.0, 3.0])
    assert torch.equal(sf.linear_recurrence(x, decay), torch.stack([x[0], x[1] + decay, x[2] + decay * (x[1] + decay)]))
