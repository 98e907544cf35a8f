"""The identity itself: expectations, joint estimators, programs, and the scan behind every return."""

from __future__ import annotations

from typing import Any

from applications.benchmarks.side_by_side.measures import TIME
from applications.benchmarks.side_by_side.row import Contender, Row, Suite

BITS = "applications.benchmarks.contenders.bits"
RECURSIONS = "applications.benchmarks.contenders.recursions"
STORCHASTIC: dict[str, Any] = {"environment": "storchastic", "package": "storchastic"}
SCAN_SHAPES = ((128, 8), (1000, 64), (2048, 1), (1000, 1024))  # T, N


def expectation(n: int, d: int) -> Row:
    own: dict[str, Any] = {"num_samples": n, "size": d}
    return Row(
        f"expectation-{n}x{d}",
        f"`expectation`, {n} draws of {d} bits",
        "f = mean (x - .499)^2 with leave-one-out, forward and backward. scorefn and the loop use one `Bernoulli` "
        "object; the tensors do without. All draw the same bits from the same seed, and their gradients are compared.",
        (
            Contender("`scorefn.expectation`", f"{BITS}:expectation", {**own, "how": "scorefn"}, "scorefn"),
            Contender("loop on the same `Bernoulli`", f"{BITS}:expectation", {**own, "how": "loop"}, "by hand"),
            Contender("raw tensors", f"{BITS}:expectation", {**own, "how": "tensors"}, "by hand"),
            Contender(
                "storchastic, `batch_average`",
                "applications.benchmarks.contenders.storchastic:bits",
                own,
                **STORCHASTIC,
            ),
        ),
        (TIME,),
        turns=40,
        quick_turns=7,
    )


def joint(name: str, factory: str, size: int, about: str) -> Row:
    return Row(
        name,
        f"`{factory_title(factory)}`, {size} bits",
        about,
        (
            Contender(
                f"`scorefn.{factory_title(factory)}`", f"{BITS}:{factory}", {"size": size, "how": "scorefn"}, "scorefn"
            ),
            Contender("loop", f"{BITS}:{factory}", {"size": size, "how": "loop"}, "by hand"),
        ),
        (TIME,),
        turns=40,
        quick_turns=7,
    )


def factory_title(factory: str) -> str:
    return {"disarm": "DisARM", "local_expectation": "LocalExpectation"}[factory]


def scan(length: int, width: int) -> Row:
    def candidate(name: str, how: str, role: Any, **more: Any) -> Contender:
        return Contender(name, f"{RECURSIONS}:scan", {"length": length, "width": width, "how": how}, role, **more)

    return Row(
        f"scan-{length}x{width}",
        f"Reverse scan, T = {length}, N = {width}",
        "T steps of N streams: y_t = x_t + decay_t y_(t+1), float32, a decay of .99 with 1 % of zeros; tensors in, a "
        "tensor out.",
        (
            candidate("`scorefn.linear_recurrence`", "`linear_recurrence`", "scorefn"),
            candidate("NumPy loop", "numpy loop", "by hand"),
            candidate("torch loop", "torch loop", "by hand"),
        ),
        (TIME,),
        turns=30,
        quick_turns=5,
    )


def gae(length: int, width: int) -> Row:
    def candidate(name: str, how: str, role: Any, **more: Any) -> Contender:
        return Contender(name, f"{RECURSIONS}:gae", {"length": length, "width": width, "how": how}, role, **more)

    return Row(
        f"gae-{length}x{width}",
        f"Generalised advantages, T = {length}, N = {width}",
        "T steps of N streams, discount .99, lambda .95, 1 % of the steps end an episode, float32, everybody in the "
        "layout of its own data. scorefn also looks for values that are not finite; "
        "Stable-Baselines3's buffer also computes the returns.",
        (
            candidate("`scorefn.trajectories.gae`", "scorefn", "scorefn"),
            candidate("NumPy loop", "loop", "by hand"),
            candidate("torch loop", "tensors", "by hand"),
            candidate("TorchRL, vectorised", "torchrl", "peer", environment="torchrl", package="torchrl"),
            candidate(
                "Stable-Baselines3, rollout buffer", "sb3", "peer", environment="sb3", package="stable-baselines3"
            ),
        ),
        (TIME,),
        turns=20,
        quick_turns=5,
    )


PROGRAM = Row(
    "program",
    "`StochasticGraph`, two sites of 16 bits, 64 draws",
    "z, then h given z; a cost of z and one of h, leave-one-out, every site charged with the costs that depend on it. "
    "The loop is told what depends on what; the graph finds it out.",
    (
        Contender(
            "`scorefn.StochasticGraph`", f"{BITS}:program", {"num_samples": 64, "size": 16, "how": "scorefn"}, "scorefn"
        ),
        Contender("loop", f"{BITS}:program", {"num_samples": 64, "size": 16, "how": "loop"}, "by hand"),
    ),
    (TIME,),
    turns=40,
    quick_turns=7,
)

CORE = Suite(
    "core",
    "Core",
    "What one estimate costs: an expectation with its backward pass, joint estimators, a program of several sites, and "
    "the recursions behind returns and advantages.",
    (
        *(expectation(n, d) for n, d in ((1000, 200), (16, 16))),
        joint(
            "disarm",
            "disarm",
            200,
            "One antithetic pair, forward and backward. All have the same expected gradient, which is checked within 5 "
            "standard errors of 400 estimates.",
        ),
        joint(
            "local-expectation",
            "local_expectation",
            20,
            "Every bit summed out in turn while the others are drawn, forward and backward. The loop calls f 40 times, "
            "scorefn once.",
        ),
        PROGRAM,
        *(scan(*shape) for shape in SCAN_SHAPES),
        *(gae(*shape) for shape in SCAN_SHAPES),
    ),
)
