"""The kernels and the jobs beside their peers: the same as `toy-lm bench`."""

import sys

from toy_lm.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
