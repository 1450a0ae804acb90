"""Format of a results folder: file names, columns of tables and values of choice columns.

The study writes this format, and the report reads it. Axes: one row of `results` per cell and task.
"""

from __future__ import annotations

FORMAT = 1  # of study.json
STUDY_FILE = "study.json"
SPLITS_FILE = "splits.json"

# Column `status`.
DONE, FAILED = "done", "failed"
# Column `role`: tasks that pruning sees, and tasks that it does not see.
SOURCE, TRANSFER = "source", "transfer"
# Column `path` of `loss_line`: the states of the model that the line connects.
DENSE_PRUNED, PRUNED_TUNED = "dense-pruned", "pruned-tuned"

Columns = dict[str, type]  # name to type, in file order; an empty field of a CSV file is None

CELL: Columns = {
    "cell": str, "model": str, "source": str, "criterion": str, "rounds": int, "sparsity": float,
    "seed": int,
}  # fmt: skip
RESULTS: Columns = {
    "study": str, **CELL, "samples": int, "damping": float, "sparsity_reached": float,
    "predicted_increase": float, "measured_increase": float,
    "task": str, "role": str, "head": str, "classes": int, "test_images": int,
    "dense": float, "pruned": float, "tuned": float,
    "status": str, "error": str,
    "fastsal": str, "torch": str, "timm": str, "threads": int, "device": str,
    "statistics_bytes": int, "seconds_statistics": float, "seconds_prune": float,
    "seconds_evaluate": float, "seconds_finetune": float,
}  # fmt: skip
LAYERS: Columns = {**CELL, "position": int, "layer": str, "weights": int, "pruned": int}
LOSS_LINE: Columns = {
    **CELL, "task": str, "role": str, "path": str, "t": float, "loss": float, "accuracy": float,
}  # fmt: skip
OVERLAP: Columns = {
    "model": str, "source": str, "seed": int, "task": str, "position": int, "layer": str,
    "diagonal": float, "eigenspace": float,
}  # fmt: skip
# Names of the files, without ".csv" and ".parquet".
TABLES: dict[str, Columns] = {
    "results": RESULTS, "layers": LAYERS, "loss_line": LOSS_LINE, "overlap": OVERLAP,
}  # fmt: skip
