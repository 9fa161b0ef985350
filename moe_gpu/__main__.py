"""`python -m moe_gpu`: the same as the command `moe-gpu`."""

import sys

from moe_gpu.cli import main

if __name__ == "__main__":
    sys.exit(main())
