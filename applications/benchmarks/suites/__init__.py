"""The suites: which rows there are, and who takes part."""

from applications.benchmarks.suites.bbo import BBO
from applications.benchmarks.suites.core import CORE
from applications.benchmarks.suites.rl import RL
from applications.benchmarks.suites.vi import VI

SUITES = {suite.name: suite for suite in (CORE, RL, VI, BBO)}

__all__ = ["SUITES"]
