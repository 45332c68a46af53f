"""Classic against fused attention, alone and inside the model: the same as `toy-lm compare`."""

import sys

from toy_lm.cli import main

if __name__ == "__main__":
    sys.exit(main(["compare", *sys.argv[1:]]))
