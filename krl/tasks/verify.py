"""The old name of krl.rewards.verify, in this version still."""

from krl import _moved

__getattr__ = _moved.attributes(__name__, "krl.rewards.verify")
