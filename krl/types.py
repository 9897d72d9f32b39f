"""The old name of krl.base.types, in this version still."""

from krl import _moved

__getattr__ = _moved.attributes(__name__, "krl.base.types")
