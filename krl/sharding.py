"""The old name of krl.base.sharding, in this version still."""

from krl import _moved

_moved.module(__name__, "krl.base.sharding")
