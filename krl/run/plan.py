"""The old name of `python -m krl.plan`, in this version still."""

from krl import _moved

if __name__ == "__main__":
    _moved.program("krl.run.plan", "krl.plan")
