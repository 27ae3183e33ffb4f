"""How the pre-check ends; the batch script acts upon it."""

EXCLUDE = 77
"""Bad nodes are to be left out of the next start."""

FAIL = 78
"""The job is to end. So ends the batch script too where another start would not help."""
