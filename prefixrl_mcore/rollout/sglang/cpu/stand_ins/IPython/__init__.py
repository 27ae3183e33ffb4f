"""Stand-in for IPython, of which SGLang's server imports two notebook functions."""
# ruff: noqa: N999 -- the name that is imported
