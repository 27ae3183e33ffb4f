"""How commands and the tasks of a job end; batch scripts and users act upon it.

Beside these: 0, 1 for what went wrong underway, and 128 + the number of a signal.
"""

BAD_INPUT = 2
"""Refused before anything was begun."""

SLURM_IS_SILENT = 69
"""A command asked for a job of which Slurm says nothing; no task ends with it."""

TIME_LIMIT = 75
"""Saved and stopped before a wall-clock limit; ``--resume`` goes on."""

STALLED = 76
"""A rank made no progress; not saved."""

EXCLUDE_NODES = 77
"""The pre-check: bad nodes are to be left out of the next start."""

GIVE_UP = 78
"""The pre-check: the job is to end. So ends the batch script too where another start would not
help."""

HUNG = 124
"""Of ``timeout``: the pre-check came to no verdict."""

SAVED_AFTER_USR1 = 128 + 10
"""Saved and stopped because of SIGUSR1; ``--resume`` goes on."""
