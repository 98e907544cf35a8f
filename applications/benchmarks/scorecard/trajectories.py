"""The sequential problems: chain, discount, bandit, tokens, advantages. numpy only; every answer is exact."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

Array = np.ndarray

STAY = 0.5  # of the chain
DISCOUNT, SECOND = 0.5, 1.2  # of the two-step problem
ARMS = np.array([0.6, 0.3, 0.1])
REWARDS = np.array([0.0, 1.0, 10.0])

# Tokens: a vocabulary of two letters and an end, at most three tokens, one row of logits per prefix.
LETTERS, LONGEST, END = 2, 3, 2
PREFIXES: list[tuple[int, ...]] = [p for n in range(LONGEST) for p in itertools.product(range(LETTERS), repeat=n)]
TABLE = np.random.default_rng(0).normal(size=(len(PREFIXES), LETTERS + 1)).round(2)


def sequences() -> list[tuple[int, ...]]:
    """The 15 sequences: those shorter than three end with END, those of three letters are cut there."""
    found = []
    for n in range(LONGEST + 1):
        for letters in itertools.product(range(LETTERS), repeat=n):
            found.append((*letters, END) if n < LONGEST else letters)
    return found


SEQUENCES = sequences()
PAYS = np.array([float(i % 3 == 0 or i == 7) for i in range(len(SEQUENCES))])  # the binary reward of every sequence


def token_log_probabilities(table: Array = TABLE) -> Array:
    """log pi of every token of every sequence ``[15, 3]``, zero after the end."""
    logs = table - np.log(np.exp(table).sum(-1, keepdims=True))
    found = np.zeros((len(SEQUENCES), LONGEST))
    for i, sequence in enumerate(SEQUENCES):
        for t, token in enumerate(sequence):
            found[i, t] = logs[PREFIXES.index(sequence[:t]), token]
    return found


def token_mask() -> Array:
    """Which of the three places a sequence fills ``[15, 3]``."""
    return np.array([[float(t < len(s)) for t in range(LONGEST)] for s in SEQUENCES])


def prefix_of_token() -> Array:
    """Row of the table that each token was drawn from ``[15, 3]``; 0 after the end."""
    return np.array([[PREFIXES.index(s[:t]) if t < len(s) else 0 for t in range(LONGEST)] for s in SEQUENCES])


def token_of_place() -> Array:
    """The tokens ``[15, 3]``; END after the end."""
    return np.array([[*s, *([END] * (LONGEST - len(s)))] for s in SEQUENCES])


def token_scores(table: Array = TABLE) -> Array:
    """d log pi(sequence) / d table ``[15, 21]``."""
    p = np.exp(table - np.log(np.exp(table).sum(-1, keepdims=True)))
    found = np.zeros((len(SEQUENCES), *table.shape))
    for i, sequence in enumerate(SEQUENCES):
        for t, token in enumerate(sequence):
            row = PREFIXES.index(sequence[:t])
            found[i, row] -= p[row]
            found[i, row, token] += 1.0
    return found.reshape(len(SEQUENCES), -1)


def token_gradient(table: Array = TABLE) -> Array:
    """The exact gradient of the expected reward ``[21]``."""
    p = np.exp(token_log_probabilities(table).sum(-1))
    return (p * PAYS) @ token_scores(table)


# A trajectory of four steps that the time limit cuts after the third: rewards, values, the value of the cut state.
GAMMA, LAMBDA = 0.9, 0.8
REWARD = np.array([1.0, 0.5, 2.0, -1.0])
VALUE = np.array([0.3, 0.8, 1.5, 0.2])
NEXT_VALUE = np.array([0.8, 1.5, 4.0, 0.6])  # of the state that each step led to; the third one's is the cut state's
TERMINATED = np.array([False, False, False, False])
TRUNCATED = np.array([False, False, True, False])


def advantages(bootstrap: bool = True) -> Array:
    """Generalised advantages of the four steps; ``bootstrap=False`` is the mistake."""
    found, running = np.zeros(4), 0.0
    for t in range(3, -1, -1):
        cut = TERMINATED[t] or (TRUNCATED[t] and not bootstrap)
        delta = REWARD[t] + GAMMA * NEXT_VALUE[t] * (not cut) - VALUE[t]
        running = delta + GAMMA * LAMBDA * running * (not (TERMINATED[t] or TRUNCATED[t]))
        found[t] = running
    return found


def rewards_to_go() -> Array:
    """Discounted reward-to-go of the same four steps without values: the cut ends a trajectory."""
    found, running = np.zeros(4), 0.0
    for t in range(3, -1, -1):
        running = REWARD[t] + GAMMA * running * (not (TERMINATED[t] or TRUNCATED[t]))
        found[t] = running
    return found


def questions(kind: str) -> list[dict[str, Any]]:
    """The arguments of the problems of a kind."""
    t, unit = STAY, (STAY * (1 - STAY)) ** 2  # variances are known in theta; the parameter is its logit
    p, mean = ARMS, float(ARMS @ REWARDS)
    anchors = [
        {
            "name": "chain",
            "quantity": "gradient in the logit",
            "ask": "stay with probability .5 for reward 1, else stop: d/dlogit of the return of one episode.",
            "start": 0.0,
            "exact": t * (1 - t) / (1 - t) ** 2,
            "references": {
                "full return": (4 * t**2 + 8 * t + 1) / (t * (1 - t) ** 4) * unit,
                "reward-to-go": (t**2 + 3 * t + 1) / (t * (1 - t) ** 4) * unit,
                "reward-to-go, baseline V": (1 + t) / (t * (1 - t) ** 4) * unit,
                "reward-to-go, best constant": 1 / (1 - t) ** 4 * unit,
            },
        },
        {
            "name": "discount",
            "quantity": "gradient in the logit",
            "ask": "two steps, one Bernoulli(.5) policy: the first pays 1 for action 1, the second 1.2 for action 0, "
            "gamma = .5: d/dlogit of the discounted return E[r0 + gamma r1].",
            "start": 0.0,
            "exact": 0.25 * (1 - DISCOUNT * SECOND),
        },
        {
            "name": "bandit",
            "quantity": "gradient in the three logits",
            "ask": "arms drawn with (.6, .3, .1) pay (0, 1, 10): the gradient of E r, 4 draws per estimate.",
            "start": np.log(ARMS),
            "exact": p * (REWARDS - mean),
        },
        {
            "name": "tokens",
            "quantity": "gradient in the 21 logits",
            "ask": "15 sequences of at most 3 tokens, binary reward, a group of 4: the gradient of E[reward].",
            "start": TABLE.reshape(-1),
            "exact": token_gradient(),
        },
        {
            "name": "advantages",
            "quantity": "the four advantages",
            "ask": "generalised advantages (gamma .9, lambda .8) of four steps, none of which ends an episode but the "
            "time limit's cut after the third, whose state has value 4: bootstrap there.",
            "start": np.zeros(1),
            "exact": advantages(),
        },
    ]
    traps = [anchors.pop()]
    traps[0]["mistake"] = "a cut by the time limit is taken for an end, so the value of the cut state is lost"
    chosen = anchors if kind == "anchor" else traps
    return [{"kind": kind, **question} for question in chosen]
