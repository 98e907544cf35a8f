"""A decision that is a dimension, a length or a flag among the arguments decides the shape of the result."""

import warnings

import pytest
import torch
import torch.nn.functional as F

from scorefn.tracking import EscapeWarning, Tracking

X = torch.zeros(2, 3, 4)

SHAPES = {
    "size": lambda z: X.size(z),
    "stride": lambda z: X.stride(z),
    "sum": lambda z: X.sum(z).shape[0],
    "sum, by name": lambda z: X.sum(dim=z).shape[0],
    "mean": lambda z: X.mean(z).shape[0],
    "amax": lambda z: X.amax(z).shape[0],
    "argmax": lambda z: X.argmax(z).shape[0],
    "max": lambda z: X.max(z)[0].shape[0],
    "unsqueeze": lambda z: X.unsqueeze(z).shape[0],
    "transpose": lambda z: X.transpose(0, z).shape[0],
    "movedim": lambda z: X.movedim(z, 0).shape[0],
    "permute": lambda z: X.permute(z, (z + 1) % 3, (z + 2) % 3).shape[0],
    "select": lambda z: X.select(z, 0).shape[0],
    "flatten": lambda z: X.flatten(z).shape[-1],
    "cat": lambda z: torch.cat([X, X], dim=z).shape[0],
    "stack": lambda z: torch.stack([X, X], dim=z).shape[0],
    "rot90": lambda z: torch.rot90(X, z).shape[0],
    "max_pool1d": lambda z: F.max_pool1d(X, z + 1).shape[-1],
    "avg_pool1d": lambda z: F.avg_pool1d(X, z + 1).shape[-1],
    "conv1d": lambda z: F.conv1d(X, torch.zeros(1, 3, 1), padding=z).shape[-1],
    "interpolate": lambda z: F.interpolate(X, size=z + 2).shape[-1],
    "fft": lambda z: torch.fft.fft(X, n=z + 3).shape[-1],
    "fftfreq": lambda z: len(torch.fft.fftfreq(z + 3)),
    "hann_window": lambda z: len(torch.hann_window(z + 3)),
    "vander": lambda z: torch.vander(X[0, 0], N=z + 2).shape[-1],
    "diff": lambda z: X.diff(n=z).shape[-1],
    "histc": lambda z: len(torch.histc(X, bins=z + 2)),
    "multinomial": lambda z: len(torch.multinomial(torch.ones(5), num_samples=z + 1)),
    "combinations": lambda z: torch.combinations(X[0, 0], r=z + 1).shape[0],
}


@pytest.mark.filterwarnings("ignore::scorefn.tracking.EscapeWarning")
@pytest.mark.parametrize("read", SHAPES.values(), ids=SHAPES.keys())
def test_a_shape_that_a_decision_chose_is_never_under_counted(read):
    with Tracking() as t:
        z = t.decision("z", torch.tensor(1))
        assert t.dependencies(torch.tensor(float(read(z)))) == {"z"}


@pytest.mark.parametrize(
    "use",
    [
        lambda z: X + z,
        lambda z: X * z,
        lambda z: z - X,
        lambda z: X.clamp(z),
        lambda z: torch.where(X.gt(z), X, z),
        lambda z: X.index_select(0, z),
        lambda z: X.masked_fill(z.bool(), 2.0),
        lambda z: torch.maximum(X, z),
    ],
)
def test_an_integer_that_is_data_decides_no_shape(use):
    with warnings.catch_warnings(), Tracking() as t:
        warnings.simplefilter("error", EscapeWarning)
        z = t.decision("z", torch.tensor(1))
        result = use(z)
        assert t.dependencies(result) == {"z"}
        assert t.dependencies(torch.tensor(float(result.shape[0]))) == frozenset()
