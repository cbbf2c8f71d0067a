"""The table of what `run.py` found, and the survivors that `explained.json` does not explain."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from mutants import mutants
from run import KEPT, ROOT

GROUPS = {
    "responses, rewards, sequences": ("fastpref/responses", "fastpref/rewards", "fastpref/seq"),
    "losses": ("fastpref/losses/",),
    "ops": ("fastpref/ops/",),
    "teacher": ("fastpref/teacher/",),
}


def main() -> None:
    reasons = json.loads((Path(__file__).parent / "explained.json").read_text())
    explained = {
        (module, change)
        for modules in reasons.values()
        for module, changes in modules.items()
        for change in changes
    }
    left = []
    print(
        "| modules | mutants | tried | killed | timed out | survived, explained | survived, left |"
    )
    print("|---|---|---|---|---|---|---|")
    for group, starts in GROUPS.items():
        counts: Counter[str] = Counter()
        for file in sorted(KEPT.glob("fastpref.*.json")):
            module = file.name.removesuffix(".py.json").replace(".", "/") + ".py"
            if not module.startswith(starts):
                continue
            counts["mutants"] += len(mutants(ROOT, module))
            for key, (found, _) in json.loads(file.read_text())["mutants"].items():
                change = key.split(": ", 1)[1]
                if found in ("survived", "no test"):
                    found = "explained" if (module, change) in explained else "left"
                    left += [f"{module}:{key}"] * (found == "left")
                counts[found] += 1
        tried = sum(counts.values()) - counts["mutants"]
        numbers = [counts[one] for one in ("killed", "timed out", "explained", "left")]
        print("|", " | ".join(map(str, (group, counts["mutants"], tried, *numbers))), "|")
    print(*left, sep="\n")


if __name__ == "__main__":
    main()
