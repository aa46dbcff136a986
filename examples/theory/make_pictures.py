"""Makes all pictures of this folder, or only those that are named.

python examples/theory/make_pictures.py [specialists posterior two_regimes critical_alpha flows] [--output_dir DIR]
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import critical_alpha
import flows
import posterior
import specialists
import two_regimes

PICTURES = {module.__name__: module for module in (specialists, posterior, two_regimes, critical_alpha, flows)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(PICTURES)}; all if none is given")
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent)
    options = parser.parse_args()
    if unknown := sorted(set(options.names) - set(PICTURES)):
        parser.error(f"expected names of {', '.join(PICTURES)}; got {', '.join(unknown)}")
    options.output_dir.mkdir(parents=True, exist_ok=True)
    for name in options.names or PICTURES:
        started = time.monotonic()
        path = options.output_dir / f"{name}.png"
        PICTURES[name].draw().savefig(path, dpi=150)
        print(f"{path}   ({time.monotonic() - started:.0f} s)")


if __name__ == "__main__":
    main()
