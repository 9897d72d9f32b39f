"""The old name of `python -m krl.plan`, in this version still."""

import runpy
import sys

if __name__ == "__main__":
    print("krl.run.plan is krl.plan now; the old name goes with the next version", file=sys.stderr)
    runpy.run_module("krl.plan", run_name="__main__")
