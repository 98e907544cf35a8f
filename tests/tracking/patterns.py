"""Ordinary ways in which a value comes to depend on a decision `z`, a tensor that is 0.0 or 1.0."""

import copy
import pickle
import threading
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import (
    Beta,
    Categorical,
    Gamma,
    Independent,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    Poisson,
    TransformedDistribution,
)
from torch.distributions.transforms import ExpTransform
from torch.utils.checkpoint import checkpoint

LOW, HIGH = torch.tensor(0.3, dtype=torch.float64), torch.tensor(1.1, dtype=torch.float64)
TABLE = torch.tensor([0.3, 1.1, -0.7], dtype=torch.float64)


def number(value):
    return torch.tensor(value, dtype=torch.float64)


def zeros(*shape):
    return torch.zeros(shape, dtype=torch.float64)


def _branch(z):
    return HIGH if z else LOW


def _item(z):
    return number(z.item() + 0.3)


def _listed(z):
    return [LOW, HIGH][int(z)]


def _as_index(z):
    return [LOW, HIGH][z.long()]


def _rounds(z):
    total = 0.2
    for _ in range(int(z)):
        total += 0.5
    return number(total)


def _iterated(z):
    total = 0.2
    for _ in z[None].nonzero():
        total += 0.5
    return number(total)


def _parsed(z):
    return number({"0.0": 0.3, "1.0": 1.1}[f"{z:.1f}"])


def _shared_memory(z):
    memory = np.zeros(2)
    torch.from_numpy(memory)[0] = z
    return number(memory.sum() + 0.1)


def _later_shared(z):
    buffer = zeros(2)
    memory = buffer.numpy()
    buffer.add_(z)
    return number(memory.sum() + 0.1)


def _gradient(z):
    x = number(2.0).requires_grad_()
    (x * x * z).backward()
    return x.grad + 0.1


def _callback(z):
    seen = []
    z.clone().apply_(lambda v: seen.append(v) or v)
    return number(seen[0] + 0.1)


def _pickled(z):
    return pickle.loads(pickle.dumps(z)) + 0.1


def _dataless_view(z):
    return TABLE[: z.long() + 1].sum()


def _sparse(z):
    return z[None].to_sparse().to_dense().sum() + 0.1


ESCAPES = {
    "if z": _branch,
    "not z": lambda z: LOW if not z else HIGH,
    "while z": lambda z: number(0.3 if z == 1 else 1.1),
    ".item()": _item,
    "float(z)": lambda z: number(float(z) + 0.3),
    "int(z)": lambda z: number(int(z) + 0.3),
    "complex(z)": lambda z: number(complex(z).real + 0.3),
    "list[int(z)]": _listed,
    "list[z]": _as_index,
    "tensor[int(z)]": lambda z: TABLE[int(z)],
    "tolist": lambda z: number(z.tolist() + 0.3),
    "tolist of many": lambda z: number(sum(torch.stack([z, z]).tolist()) + 0.3),
    ".numpy()": lambda z: torch.from_numpy(z[None].numpy() + 0.3).sum(),
    "np.sin(z)": lambda z: torch.as_tensor(np.exp(np.asarray(z)), dtype=torch.float64),
    "range(int(z))": _rounds,
    "x[:int(z)]": lambda z: TABLE[: int(z) + 1].sum(),
    "x[:z]": _dataless_view,
    "for row in nonzero": _iterated,
    "len(unbind)": lambda z: number(len(torch.unbind(z[None].nonzero())) + 0.3),
    "len(nonzero)": lambda z: number(len(z[None].nonzero()) + 0.3),
    "x[mask].shape": lambda z: number(TABLE[:1][z[None] > 0].shape[0] + 0.3),
    "x[mask].numel()": lambda z: number(torch.masked_select(TABLE[:1], z > 0).numel() + 0.3),
    "zeros(z).size()": lambda z: number(torch.zeros(z.long()).size(0) + 0.3),
    "one_hot(z).shape": lambda z: number(F.one_hot(z.long()).shape[-1] + 0.3),
    "torch.equal": lambda z: HIGH if torch.equal(z, torch.ones_like(z)) else LOW,
    "z in tensor": lambda z: HIGH if z in torch.ones(1) else LOW,
    "is_nonzero": lambda z: HIGH if z.is_nonzero() else LOW,
    "_is_all_true": lambda z: HIGH if torch._is_all_true(z[None] > 0) else LOW,
    "f-string": _parsed,
    "repr": lambda z: HIGH if "1." in repr(z) else LOW,
    "dlpack": lambda z: torch.from_dlpack(z) + 0.1,
    "pickle": _pickled,
    "written into numpy's memory": _shared_memory,
    "written into memory lent to numpy": _later_shared,
    "backward": _gradient,
    "apply_": _callback,
    "sparse": _sparse,
    "FloatTensor([z])": lambda z: torch.DoubleTensor([z]).sum() + 0.1,
    "np.array([z])": lambda z: number(np.array([z, 0.3]).sum()),
}
"""Values that leave the tensor graph: seen, with a warning."""


def _set_value(z):
    m = zeros(2)
    m[0] = z
    return m.sum() + 0.1


def _set_index(z):
    m = zeros(2)
    m[z.long()] = 1
    return m[0] + 0.1


def _set_through_view(z):
    m = zeros(2, 2)
    row = m[1]
    row[0] = z
    return m.sum() + 0.1


def _read_through_view(z):
    m = zeros(2)
    view = m[:1]
    m.add_(z)
    return view.sum() + 0.1


def _out(z):
    m = zeros()
    torch.add(z, 0.1, out=m)
    return m


def _tracked_in_place(z):
    z = z.clone()
    z.add_(1).mul_(2)
    return z


def _augmented(z):
    total = zeros()
    total += 2 * z
    return total + 0.1


def _data(z):
    m = zeros()
    m.data = z.detach().clone()
    return m + 0.1


def _copy_into(z):
    m = zeros()
    m.copy_(z)
    return m + 0.1


class _Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


class _Same(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad


def _module(make):
    torch.manual_seed(3)
    return make().double()


def _norm(z):
    norm = nn.BatchNorm1d(1, dtype=torch.float64)
    norm(torch.stack([z, z + 1, z - 3])[:, None])
    return norm.running_mean.sum() + 0.1


def _foreach(z):
    m = [zeros(), zeros()]
    torch._foreach_add_(m, [z, z])
    return m[1] + 0.1


def _jvp(z):
    with warnings.catch_warnings():  # torch scripts some of its own functions when this is first used
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.func.jvp(lambda x: x * x, (number(2.0),), (z,))[1] + 0.1


def _mixture(z):
    parts = Normal(torch.stack([z, z + 1]), torch.ones(2, dtype=torch.float64))
    return MixtureSameFamily(Categorical(torch.stack([z + 1, z + 2])), parts).log_prob(number(0.2))


KEPT = {
    "arithmetic": lambda z: 2 * z - 1,
    "where": lambda z: torch.where(z > 0, HIGH, LOW),
    "gather": lambda z: TABLE.gather(0, z.long()[None]).sum(),
    "index_select": lambda z: TABLE.index_select(0, z.long()[None]).sum(),
    "take": lambda z: TABLE.take(z.long()),
    "tensor[z]": lambda z: TABLE[z.long()],
    "one_hot": lambda z: (F.one_hot(z.long(), 3) * TABLE).sum(),
    "scatter": lambda z: (zeros(2).scatter(0, z.long()[None], 1.0) * TABLE[:2]).sum(),
    "Linear": lambda z: _module(lambda: nn.Linear(1, 1))(z[None]).sum(),
    "MLP": lambda z: _module(lambda: nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 1)))(z[None]).sum(),
    "GRU": lambda z: _module(lambda: nn.GRU(1, 2))(z[None, None])[0].sum(),
    "LayerNorm": lambda z: nn.LayerNorm(2, dtype=torch.float64)(torch.stack([z, 2 * z + 1]))[0] * (z + 1),
    "attention": lambda z: _module(lambda: nn.MultiheadAttention(2, 1))(*[z.expand(1, 2)] * 3)[0].sum(),
    "Embedding": lambda z: _module(lambda: nn.Embedding(2, 1))(z.long()).sum(),
    "autograd.Function": _Double.apply,
    "identity Function of a chosen row": lambda z: _Same.apply(TABLE.clone().requires_grad_()[z.long()]),
    "checkpoint": lambda z: checkpoint(lambda x: 2 * x + 1, z, use_reentrant=False),
    "add_ to untracked": lambda z: zeros().add_(z) + 0.1,
    "m[0] = z": _set_value,
    "m[z] = 1": _set_index,
    "write through a view": _set_through_view,
    "read through a view": _read_through_view,
    "out=": _out,
    "in place on tracked": _tracked_in_place,
    "+=": _augmented,
    ".data =": _data,
    "copy_": _copy_into,
    "BatchNorm buffer": _norm,
    "foreach": _foreach,
    "torch.tensor(z)": lambda z: torch.tensor([z, 0.1], dtype=torch.float64).sum(),
    "new_tensor(z)": lambda z: z.new_tensor([z, 0.1]).sum(),
    "as_tensor(z)": lambda z: torch.as_tensor([z, 0.1], dtype=torch.float64).sum(),
    "full(z)": lambda z: torch.full((2,), z, dtype=torch.float64).sum() + 0.1,
    "Parameter(z)": lambda z: nn.Parameter(z) + 0.1,
    "deepcopy": lambda z: copy.deepcopy(z) + 0.1,
    "vmap": lambda z: torch.vmap(lambda row: row * z + 0.1)(TABLE).sum(),
    "vmap over z": lambda z: torch.vmap(lambda x: 2 * x + 0.1)(z[None]).sum(),
    "func.grad": lambda z: torch.func.grad(lambda x: x * x * z + 0.1 * x)(number(2.0)),
    "func.jvp": _jvp,
    "autograd.grad": lambda z: torch.autograd.grad((x := number(2.0).requires_grad_()) * x * z, x)[0] + 0.1,
    "einsum": lambda z: torch.einsum("i,->i", TABLE, z).sum() + 0.1,
    "stack and sum": lambda z: torch.stack([z, z, HIGH]).sum(),
    "x[mask].sum()": lambda z: TABLE[:2][torch.stack([z, 1 - z]) > 0].sum(),
    "no_grad": torch.no_grad()(lambda z: z * 2 + 0.1),
    "inference_mode": torch.inference_mode()(lambda z: zeros().add_(z) + 0.1),
    "+= in inference_mode": torch.inference_mode()(_augmented),
    "m[0] = z in inference_mode": torch.inference_mode()(_set_value),
    "expand_as(x[mask])": lambda z: TABLE[:1].expand_as(TABLE[:1][z[None] > 0]).sum(),
    "unbind": lambda z: sum(part for part in torch.stack([z, z + 1])),
    "detach": lambda z: z.detach() + 0.1,
    "to": lambda z: z.to(torch.float32).to(torch.float64) + 0.1,
    "type": lambda z: z.type(torch.float32).type(torch.float64) + 0.1,
    "aten": lambda z: torch.ops.aten.add.Tensor(z, 0.1),
    "Normal": lambda z: Normal(z, z + 1).log_prob(number(0.2)),
    "Bernoulli": lambda z: torch.distributions.Bernoulli(probs=0.5 * z + 0.1).log_prob(number(1.0)),
    "Categorical": lambda z: Categorical(logits=torch.stack([z, 2 * z])).log_prob(torch.tensor(1)),
    "of value": lambda z: Categorical(logits=TABLE).log_prob(z),
    "Beta": lambda z: Beta(z + 1, 2.0).log_prob(number(0.3)),
    "Gamma": lambda z: Gamma(z + 1, z + 2).log_prob(number(1.3)),
    "Poisson": lambda z: Poisson(z + 1).log_prob(number(2.0)),
    "Independent": lambda z: Independent(Normal(z.expand(2), 1.0), 1).log_prob(zeros(2)),
    "MultivariateNormal": lambda z: MultivariateNormal(z.expand(2), torch.eye(2).double()).log_prob(zeros(2)),
    "MVN of covariance": lambda z: MultivariateNormal(zeros(2), torch.eye(2).double() * (z + 1)).log_prob(zeros(2)),
    "TransformedDistribution": lambda z: TransformedDistribution(Normal(z, 1.0), [ExpTransform()]).log_prob(HIGH),
    "MixtureSameFamily": _mixture,
}
"""Values that stay in the tensor graph: nothing more is counted, and nothing is said."""


def _threaded(z):
    result = []
    thread = threading.Thread(target=lambda: result.append(z * 2 + 0.1))
    thread.start()
    thread.join()
    return result[0]


def _caught(z):
    try:
        torch.distributions.Bernoulli(probs=2 * z, validate_args=True).sample()
    except ValueError:
        return LOW
    return HIGH


def _capsule(z):
    return torch.utils.dlpack.from_dlpack(torch.utils.dlpack.to_dlpack(z)) + 0.1


def _set_real(z):
    c = torch.zeros((), dtype=torch.complex128)
    c.real = z
    return c.abs() + 0.1


def _set_imag(z):
    c = torch.zeros((), dtype=torch.complex128)
    c.imag = z
    return c.imag + 0.1


INVISIBLE = {
    "another thread": _threaded,
    "a caught exception": _caught,
    "to_dlpack": _capsule,
    "c.real = z": _set_real,
    "c.imag = z": _set_imag,
}
"""What torch's Python interface does not show."""

CLEAN = {
    "constant": lambda z: HIGH,
    "zeros_like": lambda z: torch.zeros_like(z) + 0.1,
    "full_like": lambda z: torch.full_like(z, 0.3),
    "new_zeros": lambda z: z.new_zeros(2).sum() + 0.1,
    "shape": lambda z: number(z.shape.numel() + z.ndim + z[None].size(0)),
    "dtype": lambda z: torch.ones(2, dtype=z.dtype, device=z.device).sum(),
    "to like": lambda z: HIGH.to(z),
    "expand_as": lambda z: HIGH.expand_as(z[None].expand(3)).sum(),
    "type_as": lambda z: HIGH.clone().type_as(z),
    "another row": lambda z: (TABLE[z.long()], TABLE[1] + TABLE[0])[1],
    "another row after broadcasting": lambda z: (torch.broadcast_tensors(TABLE[0], z), TABLE[1] + 0)[1],
    "another row of a family's parameters": lambda z: (Normal(z, TABLE[1]).log_prob(z), TABLE[0] + 0)[1],
    "requires_grad": lambda z: HIGH if z.requires_grad else LOW,
    "isinstance": lambda z: HIGH if z.is_floating_point() and not z.is_sparse else LOW,
}
"""Values that only look as if they depended on `z`."""
