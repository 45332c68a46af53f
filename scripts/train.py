"""Train a model on a text and leave a run folder: the same as `toy-lm train`."""

import sys

from toy_lm.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
