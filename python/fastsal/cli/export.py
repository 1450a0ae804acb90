"""`fastsal export`: write the model of a run to a file for deployment."""

from __future__ import annotations

from typing import Any

import click

from fastsal.cli import options
from fastsal.cli.help import Command
from fastsal.cli.types import NUMBER, PATH, choice
from fastsal.errors import InvalidArgument
from fastsal.utils.choices import EXPORT_FORMATS

_IMAGES = 8  # on which the outputs of a file are compared


@click.command(cls=Command, short_help="Write the model of a run to a file for deployment.")
@click.argument("run", type=PATH, metavar="DIR")
@click.option(
    "--format",
    "file_format",
    type=choice((*EXPORT_FORMATS, "hub")),
    required=True,
    help="Format of the file: the weights without their zeros, lossless, for load_model (packed), "
    "or the model, for ONNX runtimes (onnx), OpenVINO (openvino), ExecuTorch with XNNPACK "
    "(executorch), Core ML (coreml) or LiteRT (litert); the state dict in 16 bits with 2:4 weights "
    "compressed by PyTorch, on a GPU of CUDA (torch-2:4); or a folder for the Hugging Face hub, "
    "which timm reads (hub).",
)
@click.option(
    "--dtype",
    type=choice(("float16", "bfloat16")),
    show_default="the model's own, float16 with torch-2:4",
    help="With packed and torch-2:4: type that the weights are rounded to.",
)
@click.option(
    "--data",
    type=PATH,
    show_default="random images",
    help="Images on which the outputs of the file are compared; not with packed.",
)
@click.option(
    "--tolerance",
    type=NUMBER,
    show_default="1e-4, or 1e-2 for 16 bits",
    help="Largest difference of the outputs of the file, relative to the largest output; not with "
    "packed.",
)
@options.run_size_option
@options.model_spec_option
@options.threads_option
@options.json_option
@options.out_option(
    "FILE",
    "File to write: .safetensors for packed, .onnx for onnx, .xml for openvino, .pte for "
    "executorch, .mlpackage for coreml, .tflite for litert, .pt for torch-2:4; a new folder for "
    "hub.",
)
def export(**given: Any) -> None:
    """Write the model of the run in DIR to a file, read it back and compare.

    A packed file has the bits of the weights that are not zero. A file of another library has the
    shapes and the zeros of the model, and its outputs within --tolerance, which only macOS can
    compare for Core ML; it requires the extra of its name, ONNX the extra export. A folder for the
    hub has plain weights, the configuration of timm and a model card.

    Example: fastsal export run --format onnx --out model.onnx
    """
    import fastsal
    from fastsal.cli.inputs import refuse_overwrite, set_threads
    from fastsal.cli.output import console, emit
    from fastsal.deploy.export import require_packages
    from fastsal.utils.sizes import gib

    if given["file_format"] == "hub":
        _write_hub_folder(given)
        return
    refuse_overwrite(given["out"], given["force"])
    set_threads(given["threads"])
    model = fastsal.load_run(given["run"], spec=given["model"])
    images = None
    if given["file_format"] != "packed":
        require_packages(given["file_format"])  # before images are read
        images = run_images(given, model, _IMAGES)
    else:
        _refuse(given, "data", "size", "tolerance")
    found = fastsal.export(
        model,
        given["out"],
        given["file_format"],
        images=images,
        dtype=given["dtype"],
        tolerance=given["tolerance"],
    )
    if given["as_json"]:
        emit(found.as_dict())
        return
    same = "weights equal in every bit"
    if given["dtype"] is not None:
        same += f" after rounding to {given['dtype']}"
    if found.format == "coreml":
        same = "outputs not compared: nothing but macOS runs Core ML"
    if found.difference is not None:
        same = f"outputs equal within {found.difference:.2g} of the largest"
    console().print(
        f"{gib(found.bytes)}, {found.ratio:.3f} of the dense weights; {found.zeros:,} of "
        f"{found.values:,} weights are zero; {same}\nWritten to {found.path}",
        soft_wrap=True,
    )


def _write_hub_folder(given: dict[str, Any]) -> None:
    from fastsal.cli.output import console, emit
    from fastsal.deploy.hub_folder import write_hub_folder

    _refuse(given, "dtype", "data", "size", "tolerance")
    folder = write_hub_folder(given["run"], given["out"], spec=given["model"])
    if given["as_json"]:
        emit({"path": str(folder), "format": "hub"})
        return
    console().print(
        f'Written to {folder}: timm.create_model("local-dir:{given["out"]}", pretrained=True)',
        soft_wrap=True,
        highlight=False,
    )


def _refuse(given: dict[str, Any], *names: str) -> None:
    """Raise InvalidArgument for options that the format has no use for."""
    chosen = given["file_format"]
    for name in names:
        if given[name] is not None:
            raise InvalidArgument(f"--{name} must not be given with --format {chosen}")


def run_images(given: dict[str, Any], model: Any, count: int) -> Any:
    """Return images of `--data` as the model of a run expects them, or random ones.

    Without `--size` they have the size of the images that the run was pruned with.
    """
    import torch

    from fastsal.cli.runfolder import recorded_size
    from fastsal.data.folders import load_images
    from fastsal.models.inputs import input_spec

    size = given["size"]
    spec = input_spec(model, size=recorded_size(given["run"]) if size is None else size)
    if given["data"] is not None:
        images = load_images(given["data"], labeled=False)
        chosen = images.batches(spec, count, samples=min(count, len(images)), shuffle_seed=0)
        return chosen.first_batch()[0]
    height, width = spec.size or (224, 224)
    draw = torch.Generator().manual_seed(0)
    return torch.randn(count, spec.channels, height, width, generator=draw)
