"""The old name of krl.hf.tokenizer, in this version still."""

from krl import _moved

__getattr__ = _moved.attributes(__name__, "krl.hf.tokenizer")
