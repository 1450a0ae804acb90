"""Print results files of `fastsal bench` as Markdown: `python -m benches.table FILE.json ...`.

Machines are beside each other.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def main() -> None:
    """Print the table and the machines of the results files."""
    parser = argparse.ArgumentParser("python -m benches.table", description=__doc__)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="of `fastsal bench`")
    records = [json.loads(file.read_text()) for file in parser.parse_args().files]
    print("\n".join(table(records)))


def table(records: list[dict[str, Any]]) -> list[str]:
    """Return the lines of the table, then those of the machines."""
    machines = [record["machine"] for record in records]
    titles = [f"{m['processor']}, {m['instructions']}" for m in machines]
    lines = [f"| what | against | {' | '.join(titles)} |", "|---" * (2 + len(records)) + "|"]
    by_case = [{(r["name"], r["peer"]): r for r in record["results"]} for record in records]
    for case in dict.fromkeys(case for results in by_case for case in results):
        cells = [_cell(results.get(case)) for results in by_case]
        if any(cells):
            lines.append(f"| {' | '.join([*case, *cells])} |")
    return [*lines, "", *(_conditions(m) for m in machines)]


def _cell(result: dict[str, Any] | None) -> str:
    """Return ratio, aim and note of a case, nothing if it did not run."""
    if result is None or result["ratio"] is None:
        return ""
    aim = f"{'≥' if result['at_least'] else '≤'} {result['limit']:g}"
    note = f"; {result['note']}" if result["note"] else ""
    return f"{result['ratio']:.2f} {result['figure']} ({aim}{note})"


def _conditions(machine: dict[str, Any]) -> str:
    return (
        f"{machine['processor']}, {machine['cores']} cores, {machine['instructions']}, "
        f"{machine['threads']} threads; PyTorch {machine['torch']}; first touch of fresh memory "
        f"{machine['first touch of fresh memory, s/GiB']} s/GiB."
    )


if __name__ == "__main__":
    main()
