"""Trajectories: episodes and segments of a Gymnasium environment under a policy, as distributions.

Gymnasium loads with the first name that needs it; records and policies work without.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from scorefn.diagnostics import SplitHalves, split_halves
from scorefn.trajectories.advantages import TemporalDifference, VTrace, gae, vtrace
from scorefn.trajectories.bias import Bias
from scorefn.trajectories.bounds import Clip, Tanh
from scorefn.trajectories.group_advantages import (
    GroupMeanAdvantage,
    GroupStandardizedAdvantage,
    LeaveOneOutAdvantage,
    WhitenedAdvantage,
)
from scorefn.trajectories.meters import (
    GradientNoise,
    PolicyChange,
    explained_variance,
    gradient_noise,
    mean_entropy,
    mean_kl_divergence,
    policy_change,
    read_meters,
)
from scorefn.trajectories.multi_categorical import MultiCategorical
from scorefn.trajectories.normalization import ObservationNormalization
from scorefn.trajectories.policies import BernoulliPolicy, CategoricalPolicy, GaussianPolicy, MultiCategoricalPolicy
from scorefn.trajectories.ratio_meters import clip_fraction, effective_sample_size
from scorefn.trajectories.ratios import (
    Clipped,
    Geometric,
    PerDecision,
    Raw,
    Sequence,
    Truncated,
    ratio_surrogate,
)
from scorefn.trajectories.recipes import (
    Objective,
    dapo,
    dr_grpo,
    grpo,
    objective,
    reinforce_plus_plus_baseline,
    rloo,
)
from scorefn.trajectories.record import Trajectories, returns, rewards
from scorefn.trajectories.recurrent import RecurrentPolicy
from scorefn.trajectories.reductions import SequenceMean, TokenMean, TokenSum
from scorefn.trajectories.sequences import Sequences, kl_surrogate, sequence_draws

if TYPE_CHECKING:
    from scorefn.trajectories.distribution import SegmentDistribution, TrajectoryDistribution
    from scorefn.trajectories.rollouts import rollout
    from scorefn.trajectories.streams import Streams

__all__ = [
    "BernoulliPolicy",
    "Bias",
    "CategoricalPolicy",
    "Clip",
    "Clipped",
    "GaussianPolicy",
    "Geometric",
    "GradientNoise",
    "GroupMeanAdvantage",
    "GroupStandardizedAdvantage",
    "LeaveOneOutAdvantage",
    "MultiCategorical",
    "MultiCategoricalPolicy",
    "Objective",
    "ObservationNormalization",
    "PerDecision",
    "PolicyChange",
    "Raw",
    "RecurrentPolicy",
    "SegmentDistribution",
    "Sequence",
    "SequenceMean",
    "Sequences",
    "SplitHalves",
    "Streams",
    "Tanh",
    "TemporalDifference",
    "TokenMean",
    "TokenSum",
    "Trajectories",
    "TrajectoryDistribution",
    "Truncated",
    "VTrace",
    "WhitenedAdvantage",
    "clip_fraction",
    "dapo",
    "dr_grpo",
    "effective_sample_size",
    "explained_variance",
    "gae",
    "gradient_noise",
    "grpo",
    "kl_surrogate",
    "mean_entropy",
    "mean_kl_divergence",
    "objective",
    "policy_change",
    "ratio_surrogate",
    "read_meters",
    "reinforce_plus_plus_baseline",
    "returns",
    "rewards",
    "rloo",
    "rollout",
    "sequence_draws",
    "split_halves",
    "vtrace",
]

_NEED_GYMNASIUM = {
    "SegmentDistribution": "distribution",
    "Streams": "streams",
    "TrajectoryDistribution": "distribution",
    "rollout": "rollouts",
}


def __getattr__(name: str) -> Any:
    """Load what needs Gymnasium with its first use."""
    if name in _NEED_GYMNASIUM:
        return getattr(import_module(f"{__name__}.{_NEED_GYMNASIUM[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names."""
    return __all__
