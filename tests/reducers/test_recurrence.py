"""The scan against a loop: values, gradients, every axis, zeros in the decay, and its several ways."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

import scorefn as sf
from scorefn.reducers import recurrence
from tests.oracles.tolerances import near


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


# ------------------------------------------------------------------------------------- one recurrence, several ways


forward_mode = pytest.mark.filterwarnings("ignore:`torch.jit")  # torch warns about itself
SHAPES = [(1, 1), (16, 3), (17, 1), (33, 2), (40, 2, 3), (300, 1), (129, 5), (18, 256), (20, 300), (2, 0), (0, 2)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("reverse", [False, True])
def test_pairs_rows_and_the_log_step_scan_agree(shape, reverse):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    decay = torch.rand(shape, generator=generator, dtype=torch.float64)
    decay = torch.where(decay < 0.1, 0.0, decay)
    for coefficient in (decay, torch.tensor(0.9, dtype=torch.float64).expand(shape)):
        for dim in range(len(shape)):
            first, second = (v.movedim(0, dim) for v in (x, coefficient))
            for y, c in ((first, second), (first.contiguous(), second.contiguous())):
                found = sf.linear_recurrence(y, c, reverse=reverse, dim=dim)
                plain = recurrence._log_step(y, c, reverse, dim)
                assert found.shape == y.shape
                assert found.is_contiguous()
                assert near(found, plain)
                assert torch.equal(found, sf.linear_recurrence(y, c, reverse=reverse, dim=dim - len(shape)))
    for number in (0.9, 1.0, 1):
        assert near(sf.linear_recurrence(x, number, reverse=reverse), recurrence._log_step(x, number, reverse, 0))


@forward_mode
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("shape", [(20, 2), (3, 2), (19, 260)])
def test_forward_derivatives_and_the_derivative_of_a_shared_decay(shape, reverse):
    generator = torch.Generator().manual_seed(1)
    x, u = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    decay, v = (torch.rand(shape[0], 1, generator=generator, dtype=torch.float64) for _ in range(2))

    def ours(x, decay):
        return sf.linear_recurrence(x, decay, reverse=reverse)

    def plain(x, decay):
        return recurrence._log_step(x, decay.expand(x.shape), reverse, 0)

    right = torch.func.jvp(plain, (x, decay), (u, v))[1]
    assert near(torch.func.jvp(ours, (x, decay), (u, v))[1], right)
    for tangents, wanted in (((u, v), right), ((u, None), ours(u, decay))):
        with forward_ad.dual_level():
            duals = [p if t is None else forward_ad.make_dual(p, t) for p, t in zip((x, decay), tangents, strict=True)]
            assert near(forward_ad.unpack_dual(ours(*duals)).tangent, wanted)
            held = [w.clone().requires_grad_() for w in (x, decay)]
            duals = [p if t is None else forward_ad.make_dual(p, t) for p, t in zip(held, tangents, strict=True)]
            assert near(forward_ad.unpack_dual(ours(*duals)).tangent, wanted)
    held = [w.clone().requires_grad_() for w in (x, decay)]
    for mine, true in zip(*[torch.autograd.grad((f(*held) * u).sum(), held) for f in (ours, plain)], strict=True):
        assert near(mine, true)
    (alone,) = torch.autograd.grad((ours(held[0], decay) * u).sum(), held[0])
    assert near(alone, recurrence._log_step(u, decay.roll(1 if reverse else -1, 0).expand(shape), not reverse, 0))
    forward = torch.func.jacfwd(ours, argnums=1)(x[:3], decay[:3])
    assert near(forward, torch.func.jacrev(ours, argnums=1)(x[:3], decay[:3]))


def test_transforms_modes_and_other_dtypes_take_the_log_step_scan():
    x, decay = torch.randn(4, 20, 2), torch.rand(4, 20, 2)
    right = torch.stack([sf.linear_recurrence(a, b) for a, b in zip(x, decay, strict=True)])
    torch.testing.assert_close(torch.func.vmap(sf.linear_recurrence)(x, decay), right)
    with torch.device("cpu"):  # a mode that sees every function of torch
        torch.testing.assert_close(sf.linear_recurrence(x[0], decay[0]), right[0])
    with FakeTensorMode():
        assert sf.linear_recurrence(torch.ones(30, 2), torch.ones(30, 2)).shape == (30, 2)
    whole = sf.linear_recurrence(torch.arange(1, 5), torch.tensor([0, 1, 0, 1]))
    assert whole.tolist() == [1, 3, 3, 7]
    turned = torch.complex(x[0], decay[0])
    assert near(sf.linear_recurrence(turned.conj().imag, decay[0]), -sf.linear_recurrence(decay[0], decay[0]), 1e-6)
    torch.testing.assert_close(sf.linear_recurrence(turned, turned)[1], turned[1] + turned[1] * turned[0])


def test_half_precision_is_off_by_the_roundings_of_its_operations():
    """Each x_s has gone through t - s products, and one sum in each of the 5 rounds that 20 steps take."""
    x, decay = torch.randn(20, 2).bfloat16(), torch.rand(20, 2).bfloat16()
    half = sf.linear_recurrence(x, decay)
    assert half.dtype == torch.bfloat16
    x, decay = x.double(), decay.double()
    size = sf.linear_recurrence(x.abs(), decay)
    products = sf.linear_recurrence(decay * torch.cat([torch.zeros(1, 2), size[:-1]]), decay)  # sum (t - s) |x_s| ...
    error, rounding = (half.double() - sf.linear_recurrence(x, decay)).abs(), torch.finfo(torch.bfloat16).eps / 2
    assert (error <= rounding * (5 * size + products) * (1 + 24 * rounding)).all()
    assert error[0].eq(0).all()


def test_dtypes_are_promoted_as_by_a_product():
    x = torch.ones(3)
    assert sf.linear_recurrence(x, torch.full((3,), 0.5, dtype=torch.float64)).dtype == torch.float64
    assert sf.linear_recurrence(x, torch.tensor(0.5, dtype=torch.float64)).dtype == torch.float32
    assert sf.linear_recurrence(x, torch.tensor([True, True, False])).tolist() == [1.0, 2.0, 1.0]
    assert sf.linear_recurrence(torch.ones(3, dtype=torch.long), 0.5).tolist() == [1.0, 1.5, 1.75]


def test_what_is_not_finite_raises_no_warning_and_spreads_until_the_cut():
    """0 x infinity is NaN: what must not be read is to be masked before."""
    x = torch.tensor([1.0, torch.inf, 1.0, 1.0] * 10)
    decay = torch.full((40,), 0.5)
    y = sf.linear_recurrence(x, decay)
    assert y[0] == 1
    assert (y[1:] == torch.inf).all()
    assert sf.linear_recurrence(x, torch.zeros(40))[2].isnan()
    finite = torch.where(x.isinf(), 3e38, x)
    assert torch.equal(sf.linear_recurrence(finite, torch.zeros(40)), finite)


@forward_mode
def test_second_derivatives_through_pairs():
    x = torch.randn(18, 2, dtype=torch.float64, requires_grad=True)
    decay = torch.rand(18, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(sf.linear_recurrence, (x, decay), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(sf.linear_recurrence, (x, decay))


@pytest.mark.parametrize("reverse", [False, True])
def test_many_backward_passes_at_once(reverse):
    x = torch.randn(18, dtype=torch.float64, requires_grad=True)
    decay = torch.rand(18, dtype=torch.float64, requires_grad=True)
    y = sf.linear_recurrence(x, decay, reverse=reverse)
    together = torch.autograd.grad(y, (x, decay), torch.eye(18).double(), is_grads_batched=True, retain_graph=True)
    for t in range(18):
        for mine, true in zip(together, torch.autograd.grad(y[t], (x, decay), retain_graph=True), strict=True):
            assert near(mine[t], true)
