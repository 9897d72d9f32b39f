"""train.py that kills its own process at a moment of its choice: python -m tests.killed MOMENT NUMBER, then train.py's arguments.

The moments are those where `strike` is called below; NUMBER counts from 0 how often they came before. Nothing is tidied up.
"""

import contextlib
import functools
import itertools
import os
import signal
import sys

from krl import train
from krl.run.checkpoint import Checkpoints
from krl.run.clock import PhaseClock
from krl.run.log import MetricsLog
from krl.run.scoring import Scoring


def arm(chosen: str, number: int) -> None:
    """Make the process kill itself at a moment."""
    calls = itertools.count()

    def strike(moment):
        if moment == chosen and next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def then_strike(owner, name, moment):
        function = getattr(owner, name)

        @functools.wraps(function)
        def armed(*arguments, **options):
            result = function(*arguments, **options)
            strike(moment)
            return result

        setattr(owner, name, armed)

    phase, rename, save = PhaseClock.phase, os.rename, Checkpoints.save

    @contextlib.contextmanager
    def armed_phase(clock, name):
        with phase(clock, name):
            yield
            strike(name)  # what the phase computed is there, and nobody has seen it

    def armed_rename(source, *arguments, **options):
        folder, name = os.path.split(source)
        if "orbax-checkpoint-tmp" in name and os.path.basename(folder) == "checkpoints":
            strike("commit")  # a checkpoint is written and has no name yet
        return rename(source, *arguments, **options)

    def armed_save(checkpoints, *arguments, **options):
        save(checkpoints, *arguments, **options)
        if checkpoints.directory.name == "checkpoints":
            strike("checkpoint")  # another thread is writing it
        if chosen != "checkpoint":
            checkpoints._manager.wait_until_finished()  # so that it is known from which one the run will continue

    PhaseClock.phase, os.rename, Checkpoints.save = armed_phase, armed_rename, armed_save
    then_strike(Scoring, "watch", "decoding")  # some rollouts have ended, others not
    then_strike(MetricsLog, "write_evaluation", "evaluated")  # the row of the metrics is still to come
    then_strike(MetricsLog, "write", "logged")  # the row of the groups is still to come


if __name__ == "__main__":
    arm(sys.argv[1], int(sys.argv[2]))
    del sys.argv[1:3]
    train.run_command()
