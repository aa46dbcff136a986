"""Writes MMLU's questions as rows of prompt and completion for fine-tuning, without those that the test split asks too.

python examples/mmlu/rows.py --dataset_name cais/mmlu --output runs/mmlu/train.jsonl
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from renyi_engine.evaluation import COMPLETIONS, load_questions, prompt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset_name", default="cais/mmlu", help="A hub id, or a folder of local files.")
    parser.add_argument("--split", default="validation", choices=["validation", "dev"])
    parser.add_argument("--limit", type=int, help="How many questions of each subject, the first ones; default: all.")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    asked = {q.text.strip() for subject in load_questions(options.dataset_name, "test").values() for q in subject}
    questions = [
        question
        for subject in load_questions(options.dataset_name, options.split).values()
        for question in subject[: options.limit]
    ]
    kept = [question for question in questions if question.text.strip() not in asked]
    rows = [{"prompt": prompt(question, []), "completion": COMPLETIONS[question.answer]} for question in kept]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{options.output}: {len(kept)} questions; {len(questions) - len(kept)} are in the test split and left out")


if __name__ == "__main__":
    main()
