"""The old name of krl.base.sharding, in this version still."""

from krl import _moved

__getattr__ = _moved.attributes(__name__, "krl.base.sharding")
