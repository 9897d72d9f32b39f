"""The old name of `python -m krl.report`, in this version still."""

from krl import _moved

if __name__ == "__main__":
    _moved.program("krl.run.report", "krl.report")
