"""The error tree: every refusal says the fact, the reason and the repair.

ScorefnError (a ValueError)
├── ShapeError       two shapes that do not belong together
├── SupportError     a support that moves with a parameter that requires grad
├── NonFiniteError   NaN or infinite values, with the draws named
└── LostRankError    another process of a torch.distributed group is gone
"""


class ScorefnError(ValueError):
    """Base of every error that scorefn raises itself; a ``ValueError``.

    Example:
        >>> import torch, scorefn as sf
        >>> logit = torch.tensor(0.0, requires_grad=True)
        >>> try:
        ...     sf.expectation(torch.distributions.Bernoulli(logits=logit), lambda x: x, 0)
        ... except ValueError as error:
        ...     print(error)
        num_samples must be an integer of at least 1, but it is 0.
    """


class ShapeError(ScorefnError):
    """Shapes that do not belong together; scorefn never repairs them by broadcasting.

    Example:
        >>> import torch, scorefn as sf
        >>> p = torch.distributions.Normal(torch.zeros(3, requires_grad=True), 1.0)
        >>> sf.expectation(p, lambda x: x.square().sum(-1, keepdim=True), 8)
        Traceback (most recent call last):
        scorefn.core.errors.ShapeError: f returned shape (8, 1), but the log-probabilities of the draws have shape
        (8, 3): f must return one value per draw, [N, *B] with N = 8 and B a leading part of the batch shape (3,). ...
    """


class SupportError(ScorefnError):
    """The support of the distribution moves with a parameter, so the identity does not hold.

    Example:
        >>> import torch, scorefn as sf
        >>> p = torch.distributions.Uniform(-1.0, torch.tensor(2.0, requires_grad=True))
        >>> sf.expectation(p, lambda x: x.square(), 8)  # scores would say -1/3; it is 1
        Traceback (most recent call last):
        scorefn.core.errors.SupportError: The support of Uniform moves with a parameter that requires grad, ...
    """


class NonFiniteError(ScorefnError):
    """A value, a log-probability or an importance weight is NaN or infinite.

    Example:
        >>> import torch, scorefn as sf
        >>> p = torch.distributions.Bernoulli(logits=torch.tensor(0.0, requires_grad=True))
        >>> x = torch.tensor([1.0, 0.0, 1.0])
        >>> sf.Draws(x, p.log_prob(x)[:, None], x[:, None].log())
        Traceback (most recent call last):
        scorefn.core.errors.NonFiniteError: f is -inf at 1 of 3 draws, namely [1]: it would make the whole gradient ...
    """


class LostRankError(ScorefnError):
    """Another process of a ``torch.distributed`` group ended or does not answer: the job cannot go on without it.

    Example:
        >>> import scorefn as sf
        >>> def train(step, checkpoint):  # in the loop of every rank
        ...     try:
        ...         step()
        ...     except sf.LostRankError as lost:
        ...         raise SystemExit(f"{lost} Resume from {checkpoint}.") from lost
    """
