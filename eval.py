"""Measure a policy: held-out prompts or benchmarks, avg@k, pass@k and maj@k.

    python eval.py --config configs/arithmetic.py --workdir runs/arithmetic [--config.eval.samples=32 ...]

krl/eval/command.py is the program; where krl is installed, krl-eval is this command.
"""

from krl.eval.command import measure, run_command

__all__ = ["measure"]

if __name__ == "__main__":
    run_command()
