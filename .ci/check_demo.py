"""Holds a run of configs/tiny_lora.py against what README says of it."""

import json
import sys
from pathlib import Path

# Family of questions: (least share before, most before, least after)
# Rounding differs between CPUs and versions of the code, and 1,000 steps amplify it: runs of this
# recipe answered 95.9 to 98.1 % of the negated questions.
LIMITS = {"other": (0.97, 1.0, 0.97), "negated": (0.0, 0.20, 0.95), "all": (0.0, 1.0, 0.965)}


def shares(row: dict) -> dict[str, float]:
    families = {"negated": ["negated"], "all": list(row["samples"])}
    families["other"] = [name for name in row["samples"] if name != "negated"]
    return {
        family: sum(row["exact"].get(name, 0) for name in names)
        / sum(row["samples"][name] for name in names)
        for family, names in families.items()
    }


def main() -> None:
    lines = (Path(sys.argv[1]) / "evaluations.jsonl").read_text().splitlines()
    before, after = (shares(json.loads(lines[i])) for i in (0, -1))
    print(f"before {before}\nafter  {after}")
    for family, (least, most, wanted) in LIMITS.items():
        if not (least <= before[family] <= most and after[family] >= wanted):
            sys.exit(
                f"{family}: before {before[family]:.3f}, after {after[family]:.3f}: out of limits"
            )


if __name__ == "__main__":
    main()
