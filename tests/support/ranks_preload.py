"""Imported once by the server that forks the ranks of ``run_on_ranks``."""

from importlib import import_module

for name in (
    "prefixrl_mcore.checkpoint.convert.offline",
    "prefixrl_mcore.checkpoint.save_load",
    "prefixrl_mcore.policy.policy",
    "tests.support.policies",
    "tests.support.tiny_models",
):
    import_module(name)
