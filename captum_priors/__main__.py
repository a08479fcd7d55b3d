"""``python -m captum_priors``: see what an attribution prior does, on data at hand."""

import sys

import torch

from captum_priors._demo.cli import main

if __name__ == "__main__":
    torch.set_num_threads(1)  # more do not help networks this small: they wait for each other
    sys.exit(main())
