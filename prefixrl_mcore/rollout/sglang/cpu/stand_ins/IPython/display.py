"""The two functions that ``sglang.utils`` imports; a server calls neither."""


def HTML(*_args: object, **_kwargs: object) -> None:  # noqa: N802 -- the name that is imported
    """Do nothing."""


def display(*_args: object, **_kwargs: object) -> None:
    """Do nothing."""
