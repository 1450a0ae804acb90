"""Help pages whose options are grouped under headings."""

from __future__ import annotations

import re

import click

# Name of an option's parameter -> heading, headings in the order of the page.
SECTIONS: dict[str, tuple[str, ...]] = {
    "Model": ("weights", "weights_key", "model", "masks", "num_classes", "in_chans", "meta"),
    "Tasks": ("tasks", "tests", "classes", "class_maps", "sources", "head"),
    "Pruning": (
        "sparsity", "sparsities", "budget", "target", "criterion", "criteria", "scope", "pattern",
        "floor", "parameters", "rounds", "compensate", "damping", "reconstruct", "recalibrate",
        "refit", "refit_steps",
    ),
    "Units": (
        "structure", "latency_batch", "unit_criterion", "multiple", "layers",
    ),
    "Accuracy or loss limit": (
        "max_accuracy_drop", "max_loss_increase", "loss_cap", "confidence",
    ),
    "Training": (
        "epochs", "lr", "optimizer", "momentum", "weight_decay", "schedule", "patience", "frozen",
        "train_head", "train_normalization",
    ),
    "Data": (
        "data", "held_out", "test", "class_map", "samples", "seeds", "size", "crop_pct",
        "crop_mode", "no_crop", "interpolation", "mean", "std", "batch_size", "workers",
    ),
    "Statistics": (
        "curvature", "block_size", "micro_batch", "precision", "statistics", "save_statistics",
    ),
    "Memory and disk": ("memory_budget", "scratch", "scratch_budget", "image_cache"),
    "Estimate": ("tokens", "ranks", "no_time"),
    "Cases": ("full", "models", "only"),
    "File": ("file_format", "dtype", "tolerance"),
    "Timing": ("runtime", "batches", "seconds"),
    "Report": ("kind", "figures", "figure", "margin", "diagnostics"),
    "Run": (
        "device", "autocast", "quick", "dry_run", "root", "retry_failed", "no_wait", "checkpoint",
        "seed", "threads", "quiet",
    ),
    "Output": ("out", "force", "save", "as_json"),
}  # fmt: skip
OTHER = "Other"
_WIDEST = 30  # characters of the first column


class Command(click.Command):
    """A command whose help groups its options by `SECTIONS`, in that order."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one list for each section that has options."""
        found: dict[str, list[tuple[int, str, str]]] = {title: [] for title in (*SECTIONS, OTHER)}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None and isinstance(param, click.Option):
                title, place = section_of(param.name)
                found[title].append((place, record[0], _without_parentheses(record[1])))
        widths = [len(first) for records in found.values() for _, first, _ in records]
        width = min(max(widths, default=0), _WIDEST)
        for title, records in found.items():
            if records:
                with formatter.section(title):
                    # Padding gives the first columns of all sections one width.
                    rows = [(first.ljust(width), text) for _, first, text in sorted(records)]
                    formatter.write_dl(rows)


def section_of(name: str | None) -> tuple[str, int]:
    """Return the section of a parameter and its place there; `OTHER` for one without a section."""
    for title, names in SECTIONS.items():
        if name in names:
            return title, names.index(name)
    return OTHER, 0


def _without_parentheses(text: str) -> str:
    """Return a help text without the parentheses that click puts around a described default."""
    return re.sub(r"\[default: \((.+)\)\]$", r"[default: \1]", text)
