"""Draws from given fields."""

import torch

import scorefn as sf


def made(**fields):
    given = {
        "x": torch.zeros(4, 2),
        "log_prob": torch.zeros(4, 2, 3, requires_grad=True),
        "fx": torch.zeros(4, 2, 5),
    }
    return sf.Draws(**given | fields)
