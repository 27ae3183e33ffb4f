"""Compile Triton kernels for a GPU on a machine without one, from their real launches.

The interpreter hides what only the compiler finds: a type that does not unify, a tile that needs
more shared memory than there is, registers that spill. ``compile_launches`` starts a process in
which Triton's driver is a stand-in that compiles for a GPU and launches nothing, and calls in it a
function that launches kernels in the usual way, on CPU tensors. So signature, specialisation and
configuration are those of the launch, and cannot drift from it.

The kernels' results stay whatever their outputs were allocated with: the function must not look at
them.
"""

import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

SHARED_BYTES = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
"""Most shared memory that one block may ask for, by compute capability; 90 is an H100."""

_ROOT = Path(__file__).resolve().parents[2]
_SECONDS = 300


@dataclass(frozen=True, kw_only=True, slots=True)
class CompiledKernel:
    """What compiling one launch gave."""

    name: str
    """The kernel function."""

    num_warps: int
    """Warps of a program; 32 threads each."""

    num_stages: int
    """Depth of the software pipeline that was asked for."""

    shared_bytes: int
    """Shared memory of a program; within ``SHARED_BYTES``, or the launch would have failed."""

    registers: int
    """Registers of a thread; 255 is the hardware's limit."""

    spill_bytes: int
    """Stores and loads of spilled registers, per thread; 0 in a kernel that is fit for use."""

    num_wgmma: int
    """Warp-group matrix instructions in the PTX; 0: no Hopper tensor core instruction is used."""

    is_wgmma_serialized: bool
    """Whether ptxas waits for each matrix instruction, because it found other instructions that
    touch its registers (C7510 to C7515): right results, at a fraction of the speed."""

    num_loops: int
    """Loops left after Triton's passes, which unroll and fuse."""

    num_tma_loads: int
    """Bulk tensor copies into shared memory in the PTX."""

    ptx_path: str
    """The PTX, kept only while ``keep_in`` of ``compile_launches`` is; else empty."""


def compile_launches(
    launch: Callable[..., None],
    *arguments: object,
    capability: int = 90,
    keep_in: Path | None = None,
) -> list[CompiledKernel]:
    """Compile every kernel that ``launch(*arguments)`` launches, in a fresh process.

    Args:
        launch: a function at the top level of a file, a test's too. It launches kernels on CPU
            tensors and does not look at their results.
        *arguments: JSON values.
        capability: compute capability to compile for, one of ``SHARED_BYTES``; 90 is an H100.
        keep_in: folder that receives the PTX and the machine code; None keeps neither.

    Returns:
        One record per distinct compilation, in order of first launch.

    Raises:
        RuntimeError: if the process fails; the message ends with what it wrote, which for a kernel
            that does not compile is the compiler's own message.
    """
    request = {
        "file": inspect.getfile(launch),
        "function": launch.__name__,
        "arguments": arguments,
        "capability": capability,
        "keep_in": None if keep_in is None else str(keep_in.resolve()),
    }
    # The interpreter is chosen when triton is first imported: hence a process, hence no variable.
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    paths = [str(_ROOT), str(_ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    environment["CUDA_VISIBLE_DEVICES"] = ""
    with tempfile.TemporaryDirectory() as folder:
        answer_path = Path(folder) / "answer.json"
        finished = subprocess.run(
            [sys.executable, "-m", "tests.support.triton_compile", str(answer_path)],
            input=json.dumps(request),
            env=environment,
            cwd=_ROOT,
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
        )
        if finished.returncode != 0 or not answer_path.exists():
            written = (finished.stdout + finished.stderr)[-6000:]
            raise RuntimeError(
                f"compiling what {launch.__name__} launches for capability {capability} failed "
                f"with status {finished.returncode}:\n{written}"
            )
        answer = json.loads(answer_path.read_text())
    return [CompiledKernel(**fields) for fields in answer]


class _IdleLauncher:
    """Stands where the compiled launcher would: takes the launch and does nothing."""

    def __init__(self, source: object, metadata: object) -> None:
        pass

    def __call__(self, *arguments: object) -> None:
        pass


class _AbsentDevice:
    """The part of Triton's driver that a launch touches, for a device that is not there."""

    launcher_cls = _IdleLauncher

    def __init__(self, capability: int) -> None:
        self.capability = capability
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": SHARED_BYTES[capability]},
            load_binary=lambda name, binary, shared, device: (None, None, 0, 0, 1024),
        )

    def get_current_target(self) -> object:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def _serve(answer_path: Path) -> None:
    """Read one request from standard input, compile, write the figures to ``answer_path``."""
    import triton
    from triton.compiler import CompiledKernel as TritonKernel

    request = json.loads(sys.stdin.read())
    device = _AbsentDevice(request["capability"])
    triton.runtime.driver.set_active(device)  # pyright: ignore[reportArgumentType]
    compiled: dict[str, TritonKernel] = {}
    original = TritonKernel._init_handles

    def remember(self: TritonKernel) -> None:
        compiled.setdefault(self.hash, self)
        original(self)

    TritonKernel._init_handles = remember
    getattr(_load(Path(request["file"])), request["function"])(*request["arguments"])
    keep_in = None if request["keep_in"] is None else Path(request["keep_in"])
    figures = [asdict(_figures(kernel, keep_in)) for kernel in compiled.values()]
    answer_path.write_text(json.dumps(figures))


def _load(file: Path) -> ModuleType:
    """Import ``file`` by its place: test folders are no packages."""
    spec = spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise RuntimeError(f"{file} cannot be imported")
    module = module_from_spec(spec)
    sys.modules[file.stem] = module
    spec.loader.exec_module(module)
    return module


def _figures(kernel: Any, keep_in: Path | None) -> CompiledKernel:
    """Assemble the PTX once more with ``-v``, which is where registers and spills are told."""
    ptx = kernel.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) if keep_in is None else keep_in
        place.mkdir(parents=True, exist_ok=True)
        ptx_path = place / f"{kernel.name}-{kernel.hash[:8]}.ptx"
        ptx_path.write_text(ptx)
        if keep_in is not None:
            ptx_path.with_suffix(".cubin").write_bytes(kernel.asm["cubin"])
            ptx_path.with_suffix(".ttgir").write_text(kernel.asm["ttgir"])
        report = _ptxas_report(ptx_path, kernel.metadata.target.arch)
    return CompiledKernel(
        name=kernel.name,
        num_warps=kernel.metadata.num_warps,
        num_stages=kernel.metadata.num_stages,
        shared_bytes=kernel.metadata.shared,
        registers=_sum_of(r"Used (\d+) registers", report),
        spill_bytes=_sum_of(r"(\d+) bytes spill (?:stores|loads)", report),
        num_wgmma=len(re.findall(r"wgmma\.mma_async", ptx)),
        is_wgmma_serialized="wgmma.mma_async instructions are serialized" in report,
        num_loops=len(re.findall(r"\bscf\.(?:for|while)\b", kernel.asm["ttgir"])),
        num_tma_loads=len(re.findall(r"cp\.async\.bulk\.tensor", ptx)),
        ptx_path="" if keep_in is None else str(ptx_path),
    )


def _ptxas_report(ptx_path: Path, capability: int) -> str:
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    finished = subprocess.run(
        [
            get_ptxas(capability).path,
            "-v",
            f"--gpu-name={sm_arch_from_capability(capability)}",
            str(ptx_path),
            "-o",
            os.devnull,
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    return finished.stdout + finished.stderr


def _sum_of(pattern: str, text: str) -> int:
    found = re.findall(pattern, text)
    if not found:
        raise RuntimeError(f"ptxas -v says nothing like {pattern!r}:\n{text}")
    return sum(int(number) for number in found)


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
