"""The old name of krl.rewards.functions, in this version still."""

from krl import _moved

_moved.module(__name__, "krl.rewards.functions")
