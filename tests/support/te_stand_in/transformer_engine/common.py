"""What Megatron subclasses."""


class recipe:  # noqa: N801  (a module there)
    """Recipes of FP8, which no test here uses."""

    class DelayedScaling:
        """Scales of the past."""
