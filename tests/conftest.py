"""One thread for each worker of `pytest -n 2`, and for the programs it starts: two workers of two threads wait for each other."""
import os

import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
