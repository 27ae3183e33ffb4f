"""Imported once by the server that forks the ranks of ``run_on_ranks``."""

import prefixrl_mcore.policy.policy  # noqa: F401  (the import is the purpose)
