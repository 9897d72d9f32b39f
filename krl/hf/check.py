"""`python -m krl.hf.check DIR` is `python -m krl.hf check DIR`."""

import sys

from krl.hf.__main__ import main

if __name__ == "__main__":
    main(["check", *sys.argv[1:]])
