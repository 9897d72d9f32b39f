"""The old name of krl.hf.tokenizer, in this version still."""

from krl import _moved

_moved.module(__name__, "krl.hf.tokenizer")
