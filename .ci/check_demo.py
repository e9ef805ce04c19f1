"""Checks that a run of configs/tiny_lora.py learns what README says."""

import json
import sys
from pathlib import Path

# Group of questions: (lowest accuracy before, highest before, lowest after)
# Rounding differs between CPUs and versions of the code, and 1,000 steps amplify it: runs of this
# recipe answered 95.9 to 98.1 % of the negated questions.
LIMITS = {"other": (0.97, 1.0, 0.97), "negated": (0.0, 0.20, 0.95), "all": (0.0, 1.0, 0.965)}


def accuracies(row: dict) -> dict[str, float]:
    """The accuracy in each group of questions, from a row of evaluations.jsonl."""
    groups = {"negated": ["negated"], "all": list(row["samples"])}
    groups["other"] = [name for name in row["samples"] if name != "negated"]
    return {
        group: sum(row["exact"].get(name, 0) for name in names)
        / sum(row["samples"][name] for name in names)
        for group, names in groups.items()
    }


def main() -> None:
    lines = (Path(sys.argv[1]) / "evaluations.jsonl").read_text().splitlines()
    before, after = (accuracies(json.loads(lines[i])) for i in (0, -1))
    print(f"before {before}\nafter  {after}")
    for group, (low, high, final) in LIMITS.items():
        if not (low <= before[group] <= high and after[group] >= final):
            sys.exit(
                f"{group}: accuracy {before[group]:.3f} before training, expected {low} to {high}; "
                f"{after[group]:.3f} after it, expected {final} or more"
            )


if __name__ == "__main__":
    main()
