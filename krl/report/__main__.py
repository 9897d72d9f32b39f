"""python -m krl.report."""

from krl.report.command import main

main()
