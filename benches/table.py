"""Print a results file of `fastsal bench` as Markdown: `python -m benches.table FILE.json`."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> None:
    """Print the table and the machine of the results file."""
    record = json.loads(Path(sys.argv[1]).read_text())
    print("| what | against | ratio | aim |\n|---|---|---|---|")
    for r in record["results"]:
        if r["ratio"] is None:
            continue
        aim = f"{'≥' if r['at_least'] else '≤'} {r['limit']:g}"
        figure = f"{r['ratio']:.2f} {r['figure']}"
        note = f" ({r['note']})" if r["note"] else ""
        print(f"| {r['name']} | {r['peer']} | {figure}{note} | {aim} |")
    m = record["machine"]
    print(
        f"\n{m['processor']}, {m['cores']} cores, {m['instructions']}, {m['threads']} threads; "
        f"PyTorch {m['torch']}; first touch of fresh memory "
        f"{m['first touch of fresh memory, s/GiB']} s/GiB."
    )


if __name__ == "__main__":
    main()
