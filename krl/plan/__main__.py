"""python -m krl.plan."""

from krl.plan.command import run_command

run_command()
