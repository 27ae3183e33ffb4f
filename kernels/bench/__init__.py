"""Benchmarks of the kernels against every peer that can be installed, in one run on one GPU.

Reading order: ``cases`` (what is computed), ``reference`` (the truth), ``implementation`` (the
interface), ``gemms``, ``ours`` and ``peers`` (the contestants), ``measure`` (timing), ``cell`` (one
case), ``records`` (the JSON), ``head`` (the command); then ``results``, ``targets``, ``plot`` and
``report``, which read the JSON alone.

Importing the package settles what Triton and the CUDA allocator read once, when they start:
without a GPU the kernels run in Triton's interpreter, and with one the allocator maps memory in
segments that grow. Contestants of different sizes take turns, and segments of fixed size would make
each of them wait for cudaMalloc in its timed turn.
"""

import os

if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
