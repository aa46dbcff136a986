"""Draws a small sample of a preference data set, and splits it into pairs for training and pairs that are held out.

python examples/over_refusal/pairs.py --output_dir runs/over_refusal
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from renyi_engine.data import load_splits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset_name", default="HuggingFaceH4/ultrafeedback_binarized", help="A hub id or a file.")
    parser.add_argument("--split", default="train_prefs")
    parser.add_argument("--num_pairs", type=int, default=240)
    parser.add_argument("--num_held_out", type=int, default=60)
    parser.add_argument("--output_dir", type=Path, required=True)
    options = parser.parse_args()
    splits = load_splits(options.dataset_name, None, "dataset_name")
    rows = splits.rows(options.split, "split", parser.get_default("split"))
    random.Random(0).shuffle(rows)
    end = options.num_pairs + options.num_held_out
    if len(rows) < end:
        parser.error(f"--num_pairs, --num_held_out: expected at most {len(rows)} together (all rows); got {end}")
    options.output_dir.mkdir(parents=True, exist_ok=True)
    for name, start, stop in (("train", 0, options.num_pairs), ("held_out", options.num_pairs, end)):
        path = options.output_dir / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows[start:stop]), encoding="utf-8")
        print(f"{path}: {stop - start} pairs")


if __name__ == "__main__":
    main()
