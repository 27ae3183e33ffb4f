"""Benchmarks of the kernels against every peer that can be installed, in one run on one GPU.

Reading order: ``cases`` (what is computed), ``reference`` (the truth), ``implementation`` (the
interface), ``gemms``, ``ours`` and ``peers`` (the contestants), ``measure`` (timing), ``cell`` (one
case), ``records`` (the JSON), ``head`` (the command); then ``results``, ``targets``, ``plot`` and
``report``, which read the JSON alone.

Importing the package settles what Triton reads once, when it starts: without a GPU the kernels run
in its interpreter.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
