"""Running statistics: those of NumPy over everything seen, and still while nobody updates them."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import scorefn as sf
from scorefn.trajectories import CategoricalPolicy, ObservationNormalization


def pieces(*sizes, scale=3.0, offset=50.0):
    return [
        torch.randn(*size, 4, dtype=torch.float64) * torch.tensor([scale, 0.1, 1e3, 1.0]) + offset for size in sizes
    ]


def state(module):
    return {key: value.clone() for key, value in module.state_dict().items()}


def unchanged(module, before):
    return all(torch.equal(before[key], value) for key, value in module.state_dict().items())


def test_statistics_are_those_of_all_data():
    normalization = ObservationNormalization(4)
    data = pieces((1,), (7, 5), (300,), (2, 3, 4), (0,), (1000, 1))
    for part in data:
        normalization.update(part)
    everything = np.concatenate([part.reshape(-1, 4).numpy() for part in data])
    assert np.abs(normalization.mean.numpy() / everything.mean(0) - 1).max() < 1e-12
    assert np.abs(normalization.variance.numpy() / everything.var(0) - 1).max() < 1e-12
    assert normalization.count.item() == len(everything) == 1 + 35 + 300 + 24 + 1000
    seen = torch.from_numpy(everything)
    by_hand = ((everything - everything.mean(0)) / everything.std(0)).clip(-10, 10)
    assert np.abs(normalization(seen).numpy() - by_hand).max() < 1e-10


def test_float32_observations_far_from_zero_lose_nothing():
    normalization = ObservationNormalization(1)
    data = (torch.rand(200_000, 1) + 1000).float()
    for part in data.split(1000):
        normalization.update(part)
    exact = data.double().numpy()
    assert abs(normalization.mean.item() - exact.mean()) < 1e-9
    assert abs(normalization.variance.item() / exact.var() - 1) < 1e-9


def test_only_what_is_present_counts():
    data, mask = torch.randn(6, 8, 4), torch.rand(6, 8) > 0.4
    poisoned = torch.where(mask.unsqueeze(-1), data, torch.nan)
    normalization, plain = ObservationNormalization(4), ObservationNormalization(4)
    normalization.update(poisoned, mask)
    plain.update(data[mask])
    assert unchanged(normalization, state(plain))
    before = state(normalization)
    normalization.update(poisoned, torch.zeros_like(mask))
    assert unchanged(normalization, before)


@pytest.mark.parametrize("clip", [10.0, math.inf])
def test_the_identity_before_the_first_update(clip):
    x = torch.randn(5, 4) * 1000
    assert torch.equal(ObservationNormalization(4, clip=clip)(x), x)


def test_forward_never_changes_anything_and_update_never_reaches_back():
    normalization = ObservationNormalization(4)
    policy = CategoricalPolicy(nn.Sequential(normalization, nn.Linear(4, 2)))
    policy.train()
    x = torch.randn(50, 4) + 3
    normalization.update(x)
    before = state(normalization)
    log_prob = policy(x).log_prob(policy.act(x)).sum()
    assert unchanged(normalization, before)
    normalization.update(x * 5)
    assert not unchanged(normalization, before)
    log_prob.backward()  # the graph holds the statistics it was built with


def test_clipped():
    normalization = ObservationNormalization(1, clip=1.5)
    normalization.update(torch.tensor([[-1.0], [1.0]]))
    assert normalization(torch.tensor([[-7.0], [0.5], [9.0]])).flatten().tolist() == [-1.5, 0.5, 1.5]
    free = ObservationNormalization(1, clip=math.inf)
    free.update(torch.tensor([[-1.0], [1.0]]))
    assert free(torch.tensor([[-7.0]])).item() == -7


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e7, -3e-5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_constant_feature_is_centred_only(constant, dtype):
    normalization = ObservationNormalization(1).to(dtype)
    for size in (1, 3, 1000):
        normalization.update(torch.full((size, 1), constant))
    seen = normalization(torch.tensor([[constant], [constant + 1]], dtype=dtype))
    assert abs(seen[0].item()) <= 1e-6 * abs(constant)
    assert abs(seen[1].item() - 1) <= 1e-6 * max(1, abs(constant))


@pytest.mark.parametrize(("offset", "size"), [(0.0, 1e-9), (1e6, 1e-5)])
def test_small_features_are_not_taken_for_constant_ones(offset, size):
    normalization = ObservationNormalization(1)
    x = torch.tensor([[offset - size], [offset + size]], dtype=torch.float64)
    normalization.update(x)
    assert (normalization(x).flatten() - torch.tensor([-1.0, 1.0])).abs().max() < 1e-4


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_shapes(shape):
    normalization = ObservationNormalization(shape)
    for batch in ((), (5,), (5, 2)):
        x = torch.randn((*batch, *shape))
        normalization.update(x)
        assert normalization(x).shape == x.shape
    assert normalization.count.item() == 1 + 5 + 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_dtype_is_that_of_the_observations(dtype):
    normalization = ObservationNormalization(2)
    normalization.update(torch.randn(10, 2, dtype=dtype))
    assert normalization(torch.randn(10, 2, dtype=dtype)).dtype == dtype
    assert normalization.mean.dtype == torch.float64


def test_integers_are_normalised_in_the_default_dtype():
    normalization = ObservationNormalization(1)
    normalization.update(torch.tensor([[0], [2]]))
    assert torch.equal(normalization(torch.tensor([[0], [3]], dtype=torch.uint8)), torch.tensor([[-1.0], [2.0]]))


def test_a_checkpoint_carries_everything():
    first, second = ObservationNormalization(4), ObservationNormalization(4)
    one, two = pieces((20,), (30,))
    first.update(one)
    nn.Sequential(second).load_state_dict(nn.Sequential(first).state_dict())  # as a part of a network
    assert torch.equal(first(two), second(two))
    assert set(first.state_dict()) == {"mean", "variance", "count"}
    first.update(two)
    second.update(two)
    assert unchanged(first, state(second))
    assert second.count.item() == 50
    assert "(4,), clip=10.0" in repr(second)


# --------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_and_nothing_is_changed(bad):
    normalization = ObservationNormalization(4)
    normalization.update(torch.randn(10, 4))
    before = state(normalization)
    data = torch.randn(6, 5, 4)
    data[2, 3, 1] = data[4, 0, 0] = bad
    with pytest.raises(sf.NonFiniteError, match=r"NaN or infinite in 2 of 30 steps: .* nothing was changed.*mask them"):
        normalization.update(data)
    assert unchanged(normalization, before)


def test_what_overflows_is_refused():
    normalization = ObservationNormalization(1)
    with pytest.raises(sf.NonFiniteError, match="infinite in 0 of 2 steps, but their squares overflow"):
        normalization.update(torch.tensor([[-1e200], [1e200]], dtype=torch.float64))
    assert unchanged(normalization, state(ObservationNormalization(1)))


@pytest.mark.parametrize("wrong", [(4, 1), (5, 4), (), (4, 3)])
def test_other_shapes_are_refused(wrong):
    normalization = ObservationNormalization((4, 5))
    for call in (normalization, normalization.update):
        with pytest.raises(sf.ShapeError, match=r"observations have shape .* shape of one observation, \(4, 5\)"):
            call(torch.zeros(wrong))


def test_masks_of_another_shape_or_kind_are_refused():
    normalization = ObservationNormalization(4)
    with pytest.raises(sf.ShapeError, match=r"mask has shape \(3,\), but .* batch shape \(3, 2\)"):
        normalization.update(torch.zeros(3, 2, 4), torch.ones(3, dtype=torch.bool))
    with pytest.raises(sf.ScorefnError, match=r"mask is torch.float32, but it must be torch.bool"):
        normalization.update(torch.zeros(3, 4), torch.ones(3))
    assert unchanged(normalization, state(ObservationNormalization(4)))


@pytest.mark.parametrize("clip", [0.0, -1.0, math.nan])
def test_a_clip_that_is_not_positive_is_refused(clip):
    with pytest.raises(sf.ScorefnError, match=r"clip must be positive, but it is .*math.inf clips nothing"):
        ObservationNormalization(4, clip=clip)


@pytest.mark.parametrize("shape", [0, (3, -1), 2.0, "4"])
def test_shapes_that_are_none_are_refused(shape):
    with pytest.raises(sf.ScorefnError, match="each size in shape must be an integer of at least 1"):
        ObservationNormalization(shape)
