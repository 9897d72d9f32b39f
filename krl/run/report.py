"""The old name of `python -m krl.report`, in this version still."""

import runpy
import sys

if __name__ == "__main__":
    print("krl.run.report is krl.report now; the old name goes with the next version", file=sys.stderr)
    runpy.run_module("krl.report", run_name="__main__")
