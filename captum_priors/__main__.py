"""``python -m captum_priors``: see what an attribution prior does, on data at hand."""

import sys

from captum_priors._demo.cli import main

if __name__ == "__main__":
    sys.exit(main())
