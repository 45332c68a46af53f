"""Continue a prompt: the same as `toy-lm generate`."""

import sys

from toy_lm.cli import main

if __name__ == "__main__":
    sys.exit(main(["generate", *sys.argv[1:]]))
