"""The old name of krl.rewards.pool, in this version still."""

from krl import _moved

__getattr__ = _moved.attributes(__name__, "krl.rewards.pool")
