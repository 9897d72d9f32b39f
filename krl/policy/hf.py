"""The old name of krl.hf.weights and of `python -m krl.hf`, in this version still."""

from krl import _moved

if __name__ == "__main__":
    _moved.program("krl.policy.hf", "krl.hf")
else:
    __getattr__ = _moved.attributes(__name__, "krl.hf.weights")
