"""`python -m adaattn_compiler.calibrate`, which torchrun can start in several processes."""

import sys

from adaattn_compiler.calibrate.cli import main

if __name__ == "__main__":
    sys.exit(main())
