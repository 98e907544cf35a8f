"""Draws for a signal, and what a baseline reads of them."""

import torch

import scorefn as sf


def draws_of(signal, **fields):
    """Draws whose own signal is the given one, `[N, *B, K]`: each decision is charged with one value."""
    K = signal.shape[-1]
    log_prob = torch.randn_like(signal).requires_grad_()
    credit = sf.Influence(torch.eye(K, dtype=torch.bool))
    return sf.Draws(torch.zeros(len(signal)), log_prob, signal, credit, **fields)


def read(baseline, signal, **fields):
    return baseline(signal, draws_of(signal, **fields))


def update(baseline, signal, **fields):
    baseline.update(signal, draws_of(signal, **fields))
