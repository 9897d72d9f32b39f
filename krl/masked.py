"""The old name of krl.base.masked, in this version still."""

from krl import _moved

__getattr__ = _moved.attributes(__name__, "krl.base.masked")
