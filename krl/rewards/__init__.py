"""Verifiable rewards: functions of a prompt, a response and an answer, and the worker processes that call them."""

from krl.base.answers import Answer
from krl.rewards.functions import load_rewards
from krl.rewards.pool import VerifierPool
from krl.rewards.verify import REWARDS, exact_match, find_reward, math_reward

__all__ = ["REWARDS", "Answer", "VerifierPool", "exact_match", "find_reward", "load_rewards", "math_reward"]
