"""Imported by name; nothing here is called without FP8."""


class FP8GlobalStateManager:
    """State of FP8."""

    @staticmethod
    def is_fp8_enabled() -> bool:
        """Return False."""
        return False


fp8_autocast = fp8_model_init = None
