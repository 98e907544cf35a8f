"""Scale-out on engines that are there already: evaluations over executors, and what they cost."""

from scorefn.scale.checkpoint import Checkpoint, read_state, write_atomically
from scorefn.scale.executors import Workers
from scorefn.scale.process_groups import (
    World,
    all_reduce_gradients,
    gather_over_ranks,
    shared_denominator,
    sum_over_ranks,
)
from scorefn.scale.ray_executor import RayExecutor
from scorefn.scale.records import WorkRecord, log_scalars
from scorefn.scale.seeds import SeedRecord
from scorefn.scale.transport import one_thread

__all__ = [
    "Checkpoint",
    "RayExecutor",
    "SeedRecord",
    "WorkRecord",
    "Workers",
    "World",
    "all_reduce_gradients",
    "gather_over_ranks",
    "log_scalars",
    "one_thread",
    "read_state",
    "shared_denominator",
    "sum_over_ranks",
    "write_atomically",
]
