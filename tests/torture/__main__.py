"""Attacks on what must always hold: `python -m tests.torture --minutes 10`, from the project's folder.

    ops             every op on random, strided, mixed and extreme inputs, against fp64
    kills           runs killed at a system call, or stopped by SIGTERM, and continued
    flips           flipped bits and cut files in what a run wrote
    two_processes   two trainings of one folder; readers beside a training

Two kinds run at a time. At the end a table says of each kind how many tries were made, how many of them were "refused"
(ended with one clear line, as they may), were "equal" (ended with the right result), or were failures. Below the table,
each class of failure stands with examples and the commands that repeat them. The exit code is 1 if there is a failure.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from .kinds import SHARES, attack
from .tally import table


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.torture", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="how long all kinds together take (default: 10)")
    parser.add_argument("--only", choices=SHARES, metavar="KIND", help="only this kind, for all of the time")
    parser.add_argument("--seed", type=int, help="the same seed makes the same tries; a new one if not given")
    parser.add_argument("--first", type=int, default=0, help="begin with the try of this number (default: 0)")
    parser.add_argument("--tries", type=int, help="end after so many tries of each kind, if the time is not up before")
    options = parser.parse_args()
    seed = random.randrange(10**6) if options.seed is None else options.seed
    print(f"seed {seed}", flush=True)
    shares = {options.only: 1.0} if options.only else SHARES
    # spawned, not forked: how torch and triton start has to be chosen before they are imported
    with (
        tempfile.TemporaryDirectory(prefix="torture-") as folder,
        ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool,
    ):
        parts = [
            pool.submit(attack, kind, seed, 60 * options.minutes * share, options.tries, options.first, Path(folder))
            for kind, share in shares.items()
        ]
        tallies = [part.result() for part in parts]
    print(table(tallies))
    return int(any(tally.failures for tally in tallies))


if __name__ == "__main__":
    sys.exit(main())
