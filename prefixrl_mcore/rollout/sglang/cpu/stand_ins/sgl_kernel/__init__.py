"""Stand-in for SGLang's kernel package on a machine without a GPU.

SGLang's CPU engine imports a few ``*_cpu`` functions by name whether it will call them or not.
No operator is registered here, so that SGLang finds no AMX support and every layer takes its
plain PyTorch path.
"""

from collections.abc import Callable

__version__ = "0.0.0+stand.in"


def __getattr__(name: str) -> Callable[..., object]:
    """Return a function that fails when it is called, for any CPU kernel."""
    if not name.endswith("_cpu"):
        raise AttributeError(f"the stand-in for sgl_kernel has no {name!r}")

    def missing(*_args: object, **_kwargs: object) -> object:
        raise NotImplementedError(f"sgl_kernel.{name}: there is no kernel for this CPU")

    return missing
