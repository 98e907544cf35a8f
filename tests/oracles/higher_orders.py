"""Derivatives of every order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

import scorefn as sf
from tests.oracles.baselines import BASELINES
from tests.oracles.settings import CREDITS, Setting, objective, setting
from tests.oracles.tolerances import EXACT, VISIBLE
from tests.oracles.toys import TOYS, values


def derivative_tensors(value: Tensor, parameters: Sequence[Tensor], order: int) -> list[Tensor]:
    """Gradient, Hessian, ... of a scalar in all parameters together: `[D]`, `[D, D]`, ..."""
    tensors, rows = [], value.reshape(1)
    size = sum(parameter.numel() for parameter in parameters)
    for depth in range(1, order + 1):
        gradients = [
            torch.autograd.grad(row, parameters, create_graph=True, materialize_grads=True)
            if row.requires_grad
            else [torch.zeros_like(parameter) for parameter in parameters]
            for row in rows.unbind()
        ]
        rows = torch.cat([torch.cat([part.reshape(-1) for part in gradient]) for gradient in gradients])
        tensors.append(rows.detach().reshape([size] * depth))
    return tensors


@cache
def true_derivatives(toy: str, discount: float, order: int) -> list[Tensor]:
    parameters = TOYS[toy].parameters((1,), seed=20)
    value = objective(TOYS[toy], TOYS[toy].enumerate(*parameters), (0,), discount)
    return derivative_tensors(value, parameters, order)


def check_orders(given: Setting, credit_name: str, baseline_name: str, order: int = 3) -> None:
    """Every derivative of `dice`, in expectation, is the derivative of the expectation; in one group, one problem."""
    row = CREDITS[credit_name]
    credit = row.make(given)
    where = f"dice, {credit_name}, {baseline_name}, on {given}"
    try:
        estimate = sf.dice(given.draws, credit=credit, baseline=BASELINES[baseline_name](given, credit))
    except sf.ScorefnError as error:
        raise AssertionError(f"refused: {where}: {error}") from error
    ours = derivative_tensors((given.weight * estimate.mean(0)).sum(), given.parameters, order)
    truth = true_derivatives(given.toy_name, row.discount, order)
    for depth, (mine, true) in enumerate(zip(ours, truth, strict=True), 1):
        assert true.abs().max() > VISIBLE, f"{where}: the derivative of order {depth} vanishes: nothing is tested"
        gap = float((mine - true).abs().nan_to_num(nan=torch.inf).max())
        assert gap < EXACT, f"{where}: the derivative of order {depth} is off by {gap:.3g}"


def check_constant_cancels(credit_name: str, toy: str = "coins", order: int = 3) -> None:
    """With leave-one-out, a constant f gives derivatives of 0 at each order, tuple by tuple."""
    given = setting(toy, "N=2")
    draws = replace(given.draws, fx=values((given.toy.J,), 14).expand(given.draws.fx.shape))
    estimate = sf.dice(draws, credit=CREDITS[credit_name].make(given), baseline=sf.LeaveOneOut()).mean(0)
    for number, tuple_value in enumerate(estimate.unbind()):
        for depth, tensor in enumerate(derivative_tensors(tuple_value, given.parameters, order), 1):
            size = float(tensor.abs().max())
            assert size < 1e-13, f"dice, {credit_name}: a constant leaves {size:.3g} at order {depth} of tuple {number}"
