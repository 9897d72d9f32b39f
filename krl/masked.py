"""The old name of krl.base.masked, in this version still."""

from krl import _moved

_moved.module(__name__, "krl.base.masked")
