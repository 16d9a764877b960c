"""One thread for every test: sums are then added in one order, here and in child processes."""

import os

import torch

if not torch.cuda.is_available():  # before anything imports triton, which reads this once
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(1)
