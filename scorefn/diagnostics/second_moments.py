"""The noise of a gradient, exact for each parameter and read off an ordinary backward pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from scorefn.core import NonFiniteError, ScorefnError, ShapeError, check_count
from scorefn.core.representation import representation

_ELEMENTS = 2**22  # of the outer products that are in memory at once


@dataclass(frozen=True)
class GradientMoments:
    """Moments of a gradient that is a sum over N independent draws, from one backward pass.

    Attributes:
        mean: the gradient itself, by name of the parameter.
        variance: of that gradient, per coordinate, by name.
        num_draws: N.
        total_variance: the sum of the variances over all coordinates.
        signal_to_noise: ``|g|^2 / total_variance``, with |g|^2 estimated by ``|mean|^2 - total_variance``, floored at
            0; infinite without noise, NaN where there is no gradient either.
        noise_scale: ``N / signal_to_noise``: so many draws have as much noise as signal. McCandlish, Kaplan, Amodei et
            al. (2018), "An empirical model of large-batch training", eq. 2.9.

    Raises:
        NonFiniteError: a gradient that is NaN or infinite.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from scorefn.diagnostics import GradientMeter
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> with (meter := GradientMeter(layer)):
        ...     layer(torch.tensor([[1.0], [3.0]])).mean().backward()  # the draws add 0.5 and 1.5
        >>> found = meter.latest
        >>> found.mean["weight"].item(), found.total_variance, found.signal_to_noise
        (2.0, 1.0, 3.0)
        >>> round(found.noise_scale, 3)  # so many draws have as much noise as signal
        0.667
    """

    mean: Mapping[str, Tensor]
    variance: Mapping[str, Tensor]
    num_draws: int
    total_variance: float = field(init=False)
    signal_to_noise: float = field(init=False)
    noise_scale: float = field(init=False)

    __repr__ = representation

    def __post_init__(self) -> None:
        """Sum up."""
        sums = [v.sum(dtype=torch.float64) for v in self.variance.values()]
        norms = [torch.linalg.vector_norm(m, dtype=torch.float64) for m in self.mean.values()]
        total, squared = torch.stack((torch.stack(sums).sum(), torch.stack(norms).square().sum())).tolist()
        if not math.isfinite(total + squared):
            raise NonFiniteError(
                "The gradient of some draw is NaN or infinite, so it has neither mean nor variance: look at the loss "
                "of this step."
            )
        ratio = _ratio(max(squared - total, 0.0), total)
        for name, value in (
            ("total_variance", total),
            ("signal_to_noise", ratio),
            ("noise_scale", self.num_draws / ratio if ratio > 0 else math.inf if ratio == 0 else math.nan),
        ):
            object.__setattr__(self, name, value)


class GradientMeter:
    """Variance, signal-to-noise ratio and noise scale of a module's gradient while it is trained.

    A gradient ``g = sum_n g_n`` over N independent draws (or examples) has the variance, for each parameter::

        Var g = N/(N - 1) (sum_n g_n^2 - g^2/N)

    and a linear layer with inputs a ``[N, in]`` and gradients delta ``[N, out]`` at its outputs has
    ``sum_n g_n^2 = (delta^2)^T (a^2)``: one product more than the gradient itself takes, and no gradient of any single
    draw. Inputs ``[N, T, in]``, and several calls in one step, are summed within each draw first. The bias has
    ``sum_n delta_n^2``, and an ``Embedding`` the squares of what reaches each row. Whatever scale the loss has (mean
    or sum over draws) is in g and in its variance alike.

    Use it as a context around forward and backward pass; it measures the first step and every ``every``-th after it,
    and does nothing in between::

        meter = GradientMeter(policy)
        for batch in data:
            with meter:
                loss = estimate(policy, batch)
                loss.backward()
            optimiser.step()
        print(meter.latest.noise_scale)

    What ties draws to each other (a baseline that reads the other draws, batch normalisation) counts with the draw
    that it passes through; a penalty on the weights is not part of g here. Source: Goodfellow (2015), "Efficient
    per-example gradient computations".

    Args:
        module: whose parameters that require grad all belong to ``Linear`` or ``Embedding`` layers.
        every: how often it measures.

    Attributes:
        latest: the ``GradientMoments`` of the last step that was measured; None before.

    Raises:
        ScorefnError: other layers with parameters, which are named; parameters shared by two layers; no parameters;
            from the context, no backward pass inside it, fewer than two draws, or inputs changed in place.
        ShapeError: from the context, layers that disagree about N, or an input without an axis of draws.
        NonFiniteError: from the context, a gradient that is NaN or infinite.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from scorefn.diagnostics import GradientMeter
        >>> policy = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        >>> meter = GradientMeter(policy, every=2)
        >>> for step in range(3):  # the first and the third step are measured
        ...     with meter:
        ...         loss = policy(torch.randn(16, 4)).square().mean()
        ...         loss.backward()
        >>> meter.latest.num_draws, sorted(meter.latest.variance)
        (16, ['0.bias', '0.weight', '2.bias', '2.weight'])
    """

    def __init__(self, module: nn.Module, *, every: int = 20) -> None:
        if not isinstance(module, nn.Module):
            raise ScorefnError(f"GradientMeter measures a torch.nn.Module, but it was given {type(module).__name__}.")
        self.every = check_count("every", every)
        self.latest: GradientMoments | None = None
        self._layers = _layers(module)
        self._steps = 0
        self._records: dict[str, list[_Record]] = {}
        self._handles: list[RemovableHandle] = []

    def __repr__(self) -> str:
        return f"GradientMeter({len(self._layers)} layers, every={self.every})"

    def __enter__(self) -> GradientMeter:
        """Listen to the layers, where this step is measured."""
        if self._handles:
            raise ScorefnError("This GradientMeter is inside its own context already: one step at a time.")
        if self._steps % self.every == 0:
            self._records = {name: [] for name in self._layers}
            for name, layer in self._layers.items():
                self._handles.append(layer.register_forward_hook(_listener(self._records[name])))
        self._steps += 1
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Make the moments of what was heard; after an error inside, of nothing."""
        measured, records = bool(self._handles), self._records
        for handle in self._handles:
            handle.remove()
        self._handles, self._records = [], {}
        if measured and kind is None:
            with torch.no_grad():
                self.latest = self._moments(records)

    def _moments(self, records: Mapping[str, list[_Record]]) -> GradientMoments:
        reached = {name: [r for r in calls if r.output_grad is not None] for name, calls in records.items()}
        if not any(reached.values()):
            raise ScorefnError(
                "No gradient reached the layers inside the meter's context: put both the forward pass and "
                "loss.backward() inside the with block, outside torch.no_grad()."
            )
        N = self._count(reached)
        mean: dict[str, Tensor] = {}
        variance: dict[str, Tensor] = {}
        for name, layer in self._layers.items():
            for part, (total, squares) in _squares(layer, reached[name], N).items():
                full = f"{name}.{part}" if name else part
                mean[full] = total
                variance[full] = squares.addcmul_(total, total, value=-1 / N).clamp_(min=0).mul_(N / (N - 1))
        return GradientMoments(mean, variance, N)

    def _count(self, reached: Mapping[str, list[_Record]]) -> int:
        """N, on which all calls agree."""
        first, N = "", 0
        for name, calls in reached.items():
            for record in calls:
                event = 0 if isinstance(self._layers[name], nn.Embedding) else 1
                if record.inputs._version != record.version:
                    raise ScorefnError(
                        f'The input of "{name}" was changed in place after the layer read it, so its outer products '
                        "are lost: use an operation that makes a new tensor."
                    )
                if record.inputs.ndim <= event:
                    raise ShapeError(
                        f'The input of "{name}" has shape {tuple(record.inputs.shape)}, without an axis of draws: give '
                        "all draws at once, [N, ...]."
                    )
                if N and len(record.inputs) != N:
                    raise ShapeError(
                        f'"{name}" was given {len(record.inputs)} rows and "{first}" {N}: the first axis must be that '
                        "of the draws in every layer. Keep further axes apart, [N, T, ...], instead of flattening them."
                    )
                first, N = name, len(record.inputs)
        if N < 2:
            raise ScorefnError(
                f"The layers were given {N} draw, but at least 2 are needed: one gradient says nothing about its own "
                "noise. Take more draws."
            )
        return N


@dataclass(eq=False)
class _Record:
    """One call of a layer: what went in, and the gradient at what came out."""

    inputs: Tensor
    version: int
    output_grad: Tensor | None = None

    def add(self, g: Tensor) -> None:
        g = g.detach()
        self.output_grad = g if self.output_grad is None else self.output_grad + g


def _listener(calls: list[_Record]) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
    def heard(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        if output.requires_grad and torch.is_grad_enabled():
            record = _Record(inputs[0].detach(), inputs[0]._version)
            calls.append(record)
            output.register_hook(record.add)

    return heard


def _layers(module: nn.Module) -> dict[str, nn.Linear | nn.Embedding]:
    """The layers that hold all parameters, by name."""
    found: dict[str, nn.Linear | nn.Embedding] = {}
    strange: list[str] = []
    owners: dict[int, str] = {}
    for name, layer in module.named_modules():
        own = [q for q in layer.parameters(recurse=False) if q.requires_grad]
        if not own:
            continue
        plain = type(layer) is nn.Linear or (
            type(layer) is nn.Embedding and layer.max_norm is None and not (layer.scale_grad_by_freq or layer.sparse)
        )
        if not plain or hasattr(layer, "parametrizations"):
            strange.append(f'{type(layer).__name__} "{name}"' if name else f"{type(layer).__name__} itself")
            continue
        assert isinstance(layer, nn.Linear | nn.Embedding)
        for q in own:
            if (other := owners.setdefault(id(q), name)) != name:
                raise ScorefnError(
                    f'"{other}" and "{name}" share a parameter, whose gradient is then no sum of outer products of one '
                    "layer. Measure a part of the module in which it is used once."
                )
        found[name] = layer
    if strange:
        raise ScorefnError(
            f"{', '.join(strange)} in {type(module).__name__}: GradientMeter knows the gradients of single draws in "
            "plain Linear and Embedding layers only. Measure a submodule without these, freeze them with "
            "requires_grad_(False), or use gradient_statistics with repeats."
        )
    if not found:
        raise ScorefnError(f"{type(module).__name__} has no parameters that require grad, so there is no gradient.")
    return found


def _squares(layer: nn.Linear | nn.Embedding, calls: list[_Record], N: int) -> dict[str, tuple[Tensor, Tensor]]:
    """``sum_n g_n`` and ``sum_n g_n^2`` of each parameter that requires grad."""
    names = [name for name, q in layer.named_parameters(recurse=False) if q.requires_grad]
    if not calls:
        return {name: (torch.zeros_like(q), torch.zeros_like(q)) for name in names for q in [getattr(layer, name)]}
    if isinstance(layer, nn.Embedding):
        return {"weight": _of_rows(layer, calls, N)}
    outputs = _joined([r.output_grad for r in calls if r.output_grad is not None], N)  # [N, T, out]
    found: dict[str, tuple[Tensor, Tensor]] = {}
    if "weight" in names:
        inputs = _joined([r.inputs for r in calls], N)
        total = outputs.flatten(0, 1).T @ inputs.flatten(0, 1)
        if outputs.shape[1] == 1:
            squares = outputs.flatten(0, 1).square().T @ inputs.flatten(0, 1).square()
        else:
            squares = torch.zeros_like(total)
            chunk = max(_ELEMENTS // total.numel(), 1)
            for delta, a in zip(outputs.split(chunk), inputs.split(chunk), strict=True):
                squares += (delta.transpose(1, 2) @ a).square().sum(0)
        found["weight"] = total, squares
    if "bias" in names:
        per_draw = outputs.sum(1)
        found["bias"] = per_draw.sum(0), per_draw.square().sum(0)
    return found


def _joined(parts: list[Tensor], N: int) -> Tensor:
    """``[N, ..., size]`` of several calls as ``[N, T, size]``."""
    whole = [part.reshape(N, -1, part.shape[-1]) for part in parts]
    return whole[0] if len(whole) == 1 else torch.cat(whole, 1)


def _of_rows(layer: nn.Embedding, calls: list[_Record], N: int) -> tuple[Tensor, Tensor]:
    """Of the rows of an embedding: what one draw sends to one row is summed before it is squared."""
    weight = layer.weight
    row = torch.cat([r.inputs.reshape(N, -1) for r in calls], 1)
    delta = _joined([r.output_grad for r in calls if r.output_grad is not None], N).flatten(0, 1)
    cell = (torch.arange(N, device=row.device).unsqueeze(1) * len(weight) + row).flatten()
    if layer.padding_idx is not None:
        kept = (row != layer.padding_idx).flatten()
        cell, delta = cell[kept], delta[kept]
    cells, place = cell.unique(return_inverse=True)
    sums = delta.new_zeros(len(cells), delta.shape[-1]).index_add(0, place, delta)
    rows = cells % len(weight)
    return tuple(torch.zeros_like(weight).index_add(0, rows, v) for v in (sums, sums.square()))  # type: ignore[return-value]


def _ratio(signal: float, noise: float) -> float:
    return signal / noise if noise > 0 else math.inf if signal > 0 else math.nan
