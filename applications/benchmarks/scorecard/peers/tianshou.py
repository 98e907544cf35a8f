"""Tianshou: how it computes returns and advantages from a buffer."""

from __future__ import annotations

import numpy as np
import torch
from tianshou.algorithm.algorithm_base import Algorithm
from tianshou.data import Batch, ReplayBuffer

from applications.benchmarks.scorecard import trajectories as sequential
from applications.benchmarks.scorecard.problems import PROBLEMS, Problem
from applications.benchmarks.scorecard.protocol import Answer, Peer

DOCS = "https://tianshou.org"

peer = Peer("tianshou", packages=("tianshou", "torch", "numpy"), seed_all=torch.manual_seed)


@peer.row("advantages", "Algorithm.compute_episodic_return", link=DOCS)
def gae(problem: Problem) -> Answer:
    buffer = ReplayBuffer(size=4)
    for t in range(4):
        terminated, truncated = bool(sequential.TERMINATED[t]), bool(sequential.TRUNCATED[t])
        step = Batch(
            obs=t, act=0, rew=sequential.REWARD[t], terminated=terminated, truncated=truncated, obs_next=t + 1, info={}
        )
        buffer.add(step)
    batch, indices = buffer.sample(0)

    def one():
        _, found = Algorithm.compute_episodic_return(
            batch,
            buffer,
            indices,
            v_s_=np.array(sequential.NEXT_VALUE),
            v_s=np.array(sequential.VALUE),
            gamma=sequential.GAMMA,
            gae_lambda=sequential.LAMBDA,
        )
        return found

    return Answer(one=one, exact=True)


peer.lacks(tuple(name for name in PROBLEMS if name != "advantages"), "whole algorithms: nothing smaller is documented")

if __name__ == "__main__":
    peer.main()
