"""Runs megatron-core on CPU tensors over gloo when the machine has no CUDA device.

megatron-core takes a CUDA device for granted in a few places: it asks for
``torch.cuda.current_device()``, the literal ``device="cuda"`` and ``tensor.cuda()``, calls
``torch.cuda.synchronize()``, and compares ``tensor.type()`` with the names of CUDA tensor types.
Two mechanisms redirect exactly these, and both do nothing when CUDA is available:

* ``install`` replaces the attributes listed in ``REPLACED_ATTRIBUTES``, once per process.
* ``megatron_on_cpu`` is a context in which calls *made by megatron's own code* that ask for a CUDA
  device get a CPU one (a ``TorchFunctionMode``; calls of any other module pass unchanged).
  Everything that runs megatron code must be inside it. It is a context and not a permanent state
  because a function mode costs about one microsecond on every torch call of the thread, which
  would slow token-by-token generation in the same process by a quarter.

Both can go when megatron-core takes its device from an argument.
"""

import contextlib
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

logger = logging.getLogger(__name__)

CPU = torch.device("cpu")

REPLACED_ATTRIBUTES = (
    "torch.cuda.current_device",
    "torch.cuda.synchronize",
    "torch.cuda.current_stream",
    "torch.cuda.default_stream",
    "torch.cuda.stream",
    "megatron.core.transformer.moe.token_dispatcher.maybe_move_tensor_to_cpu",
    "megatron.core.transformer.moe.token_dispatcher.MoEAlltoAllTokenDispatcher.cuda_dtoh_stream",
    "megatron.core.tensor_parallel.mappings._gather_along_first_dim",
    "megatron.core.tensor_parallel.random._get_cuda_rng_state",
    "megatron.core.tensor_parallel.random._set_cuda_rng_state",
    "megatron.core.tensor_parallel.random.CudaRNGStatesTracker.add",
    "megatron.core.tensor_parallel.random.CudaRNGStatesTracker.fork",
)
"""Dotted names that ``install`` replaces on a machine without CUDA."""

_TYPE_NAMES = {
    "torch.FloatTensor": "torch.cuda.FloatTensor",
    "torch.HalfTensor": "torch.cuda.HalfTensor",
    "torch.BFloat16Tensor": "torch.cuda.BFloat16Tensor",
}
_MEGATRON_PACKAGE = "megatron."


class _NullStream:
    """A CUDA stream that has nothing to wait for: CPU operations finish in order.

    It is its own events, too.
    """

    def record_event(self, event: object = None) -> "_NullStream":
        """Return an event that has happened."""
        return self

    def wait_stream(self, stream: object) -> None:
        """Return at once."""

    def synchronize(self) -> None:
        """Return at once."""


class _CpuForMegatron(TorchFunctionMode):
    """Redirects CUDA requests of megatron's code to the CPU; other callers pass unchanged."""

    def __init__(self) -> None:
        """Start with nothing redirected."""
        super().__init__()
        self.redirected: set[str] = set()

    def is_entered(self) -> bool:
        """Return whether this thread is inside the mode already."""
        return any(mode is self for mode in _get_current_function_mode_stack())

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,  # noqa: ANN401  (signature of torch)
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401  (whatever func returns)
        """Call ``func``, with a CPU device where megatron asked for a CUDA one."""
        if kwargs:
            if _wants_cuda(kwargs) and self._is_megatron_calling():
                kwargs = _on_cpu(kwargs)
            return func(*args, **kwargs)
        if func is torch.Tensor.cuda and self._is_megatron_calling():
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and self._is_megatron_calling():
            name = func(*args)
            return _TYPE_NAMES.get(name, name)
        return func(*args)

    def _is_megatron_calling(self) -> bool:
        """Return whether the call being handled was written in megatron's code; record it."""
        # Frame 0 is this function, 1 is __torch_function__, 2 made the call.
        frame = sys._getframe(2)
        module = frame.f_globals.get("__name__", "")
        if not module.startswith(_MEGATRON_PACKAGE):
            return False
        self.redirected.add(f"{module}:{frame.f_code.co_qualname}")
        return True


def _wants_cuda(kwargs: Mapping[str, Any]) -> bool:
    """Return whether keyword arguments ask for a CUDA device or for pinned memory."""
    if kwargs.get("pin_memory"):
        return True
    device = kwargs.get("device")
    return device is not None and torch.device(device).type == "cuda"


def _on_cpu(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return keyword arguments with a CPU device and without pinned memory."""
    replaced = dict(kwargs)
    if "device" in replaced:
        replaced["device"] = CPU
    if "pin_memory" in replaced:
        replaced["pin_memory"] = False
    return replaced


_mode: _CpuForMegatron | None = None


def install() -> None:
    """Make megatron-core usable without CUDA; safe to call more than once.

    Without CUDA, the attributes of ``REPLACED_ATTRIBUTES`` are replaced in this process. With
    CUDA nothing is replaced.
    """
    global _mode
    if torch.cuda.is_available() or _mode is not None:
        return
    _replace_cuda_functions()
    _replace_rng()
    _replace_token_dispatcher()
    _replace_uneven_gather()
    _mode = _CpuForMegatron()
    logger.info("no CUDA device: megatron-core runs on the CPU")


@contextlib.contextmanager
def megatron_on_cpu() -> Iterator[None]:
    """Context (or decorator) inside which megatron code gets CPU tensors; nests; no-op with CUDA.

    Belongs to the thread that enters it. Do not hold it across a ``yield`` of a generator.
    """
    if _mode is None or _mode.is_entered():
        yield
        return
    with _mode:
        yield


def redirected_functions() -> frozenset[str]:
    """Return ``module:function`` of megatron's functions whose CUDA requests went to the CPU.

    Those seen so far in this process; a test compares them with what is known to be safe, so that
    an upgrade of megatron-core cannot add one unnoticed.
    """
    return frozenset(_mode.redirected) if _mode else frozenset()


def device() -> torch.device:
    """Return the device of this process's share of the model."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return CPU


def _replace_cuda_functions() -> None:
    """Replace ``torch.cuda`` functions that megatron calls without asking for CUDA."""
    stream = _NullStream()
    replacements: dict[str, Callable[..., object]] = {
        "current_device": lambda: CPU,  # megatron passes it on as ``device=``
        "synchronize": lambda *args, **kwargs: None,
        "current_stream": lambda *args, **kwargs: stream,
        "default_stream": lambda *args, **kwargs: stream,
        "stream": lambda *args, **kwargs: contextlib.nullcontext(),
    }
    for name, replacement in replacements.items():
        setattr(torch.cuda, name, replacement)


def _replace_token_dispatcher() -> None:
    """Let Megatron's dispatcher of tokens to experts count on the CPU.

    It makes a stream of its own to copy counts to the host, and turns them into numpy arrays only
    when they come from there; ``all_to_all_single`` takes no tensors as split sizes.
    """
    from megatron.core.transformer.moe import token_dispatcher

    def maybe_move_tensor_to_cpu(
        tensor: object, as_numpy: bool = False, record_stream: bool = False
    ) -> object:
        return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor

    dispatcher = token_dispatcher.MoEAlltoAllTokenDispatcher
    setattr(dispatcher, "cuda_dtoh_stream", _NullStream())  # noqa: B010  (declared None)
    setattr(token_dispatcher, "maybe_move_tensor_to_cpu", maybe_move_tensor_to_cpu)  # noqa: B010  (declared to return a tensor)


def _replace_uneven_gather() -> None:
    """Gather unequal numbers of rows, as expert tensor parallelism does; gloo cannot."""
    from megatron.core.tensor_parallel import mappings

    gather_equal = mappings._gather_along_first_dim

    def gather(
        rows: torch.Tensor,
        group: torch.distributed.ProcessGroup,
        output_split_sizes: Sequence[int] | None = None,
        use_global_buffer: bool = False,
    ) -> torch.Tensor:
        if output_split_sizes is None or len(output_split_sizes) == 1:
            return gather_equal(rows, group, output_split_sizes, use_global_buffer)
        sizes = [int(size) for size in output_split_sizes]
        padded = rows.new_zeros((max(sizes), *rows.shape[1:]))
        padded[: rows.size(0)] = rows
        parts = gather_equal(padded, group).split(max(sizes)) if max(sizes) else [padded]
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=False)])

    setattr(mappings, "_gather_along_first_dim", gather)  # noqa: B010  (declared without types)


def _replace_rng() -> None:
    """Let megatron's random-state tracker keep states of the CPU generator."""
    from megatron.core.tensor_parallel import random

    def get_state(*args: object, **kwargs: object) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(new_state: torch.Tensor, *args: object, **kwargs: object) -> None:
        torch.set_rng_state(new_state)

    def add(tracker: random.CudaRNGStatesTracker, name: str, seed: int) -> None:
        if name in tracker.states_:
            raise RuntimeError(f"random state {name!r} is tracked already")
        tracker._is_initialized = True
        tracker.seeds_.add(seed)
        tracker.states_[name] = torch.Generator().manual_seed(seed).get_state()

    @contextlib.contextmanager
    def fork(
        tracker: random.CudaRNGStatesTracker, name: str = "model-parallel-rng"
    ) -> Iterator[None]:
        # The original warns when the CPU generator moved, which is the purpose here.
        outer_state, outer_name = torch.get_rng_state(), tracker._current_state_name
        torch.set_rng_state(tracker.states_[name])
        tracker._current_state_name = name
        try:
            yield
        finally:
            tracker.states_[name] = torch.get_rng_state()
            tracker._current_state_name = outer_name
            torch.set_rng_state(outer_state)

    random._get_cuda_rng_state = get_state
    random._set_cuda_rng_state = set_state
    for name, replacement in (("add", add), ("fork", fork)):
        setattr(random.CudaRNGStatesTracker, name, replacement)


def silence_known_messages() -> None:
    """Hide remarks of megatron-core and torch that say nothing about a run of ours.

    Called when ``prefixrl_mcore.policy`` is imported, before megatron's modules are.
    """
    # Optional packages: the layer spec here uses neither.
    for message in (
        r"Apex is not installed",
        r"Transformer Engine and Apex are not installed",
        r"full scope is deprecated",  # about CUDA graphs, raised by megatron's own default
        r"MimoModelConfig is experimental",
        r"If you are using transformer_engine as the transformer implementation",  # core_attn
    ):
        warnings.filterwarnings("ignore", message=message)
    # GPTModel is named deprecated in favour of HybridModel, which has no output_processor hook in
    # megatron-core 0.19.2; build.py is the only file to change when it has.
    _drop_messages("megatron.core.models.gpt.gpt_model", "GPTModel IS DEPRECATED")
    # Megatron imports torch's compiler for CUDA extensions, which we do not call.
    _drop_messages("torch.utils.cpp_extension", "No CUDA runtime is found")
    # The layout that the remark asks for belongs to optimizers that we do not use.
    _drop_messages("megatron.core.distributed.distributed_data_parallel", "full_param_layout")


def _drop_messages(logger_name: str, part: str) -> None:
    """Drop records of one logger that contain ``part``."""
    logging.getLogger(logger_name).addFilter(lambda record: part not in record.getMessage())
