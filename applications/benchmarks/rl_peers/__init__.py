"""CartPole-v1 beside the hand-written loop, Stable-Baselines3, Tianshou and TorchRL: a program, see ``__main__``."""
