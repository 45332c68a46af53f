"""What follows a word, counted in the text and predicted by the model: the same as `toy-lm top-k`."""

import sys

from toy_lm.cli import main

if __name__ == "__main__":
    sys.exit(main(["top-k", *sys.argv[1:]]))
