"""The parameters of SNES."""


def parameters(strategy):
    return strategy.location.detach().clone(), strategy.log_scale.detach().clone()
