"""The whole idea on the sample text: train, generate, top-K tables, classic against fused attention (`make demo`)."""

import shutil
import sys
import time

from toy_lm.cli import main

RUN, COMPARISON = "runs/demo", "runs/demo-compare"
JOBS = (
    ("What runs on this machine", ["info"]),
    ("Train on the sample text", ["train", "--corpus", "sample", "--out", RUN]),
    ("Generate from a prompt", ["generate", "the quick brown", "--run", RUN, "--top-k", "50"]),
    (
        "The candidates behind each token",
        ["generate", "the", "--run", RUN, "--max-new-tokens", "4", "--show-top-k", "4"],
    ),
    ("What follows a word: counted and predicted", ["top-k", "the", "quick", "brown", "--run", RUN]),
    ("Classic against fused attention", ["compare", "--out", COMPARISON]),
)


def demo() -> int:
    begin = time.perf_counter()
    shutil.rmtree(RUN, ignore_errors=True)
    for number, (heading, arguments) in enumerate(JOBS, start=1):
        print(f"\n{number}. {heading}: toy-lm {' '.join(arguments)}\n", flush=True)
        if status := main(arguments):
            return status
    print(f"\nDone in {time.perf_counter() - begin:.0f} seconds. To look at:")
    print(f"  {RUN}/loss.png                the losses while training")
    print(f"  {COMPARISON}/compare.png    classic against fused attention")
    print(f'  toy-lm generate "the lazy dogs" --run {RUN}')
    return 0


if __name__ == "__main__":
    sys.exit(demo())
