"""Compare per-sample gradients with autograd for one model of every family of timm: `make sweep`.

A family is a module of timm. Its model with the fewest weights is built with random weights and
running statistics of random images, for the smallest images that it accepts, in float64. Above 60
million weights it is float32, and every second parameter is compared, every third above 120 million
and so on. The gradients of `fastsal.per_sample_gradients` are compared with those of autograd, one
image at a time, and the model must be as it was before: tensors, modes, flags, hooks and `.grad`.
Each model runs in a process of its own, with a time limit. Rerun the same command to resume;
`--again` repeats models that did not pass.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import multiprocessing
import time
import warnings
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastsal
from fastsal.errors import FastsalError
from fastsal.gradients import GradientEngine, select_parameters
from fastsal.utils.json_files import read_json, write_json
from fastsal.utils.machine import machine, versions

OUT = Path(__file__).parent / "results" / "families.json"
CLASSES = 10
IMAGES = 3
SIZES = (32, 48, 64, 96, 112, 128, 160, 192, 224, 240, 256, 288, 320, 384, 448, 512)
LARGE = 60_000_000  # weights above which a model runs in float32
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
# Gradients that are zero in exact arithmetic are rounding noise: errors are relative to the norm of
# a gradient plus this share of the largest norm of the model.
NOISE = 1e-4


def main() -> None:
    """Run the families that have no result yet, and write the results and the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT, help="JSON file; the table is beside it")
    parser.add_argument("--families", nargs="*", help="names of timm's modules; all by default")
    parser.add_argument("--limit", type=float, default=60, help="seconds for a model")
    parser.add_argument("--again", action="store_true", help="repeat models that did not pass")
    given = parser.parse_args()
    torch.set_num_threads(1)  # children are forked, which idle threads of the parent do not survive
    record: dict[str, Any] = read_json(given.out, "out") if given.out.exists() else {}
    results: dict[str, dict[str, Any]] = record.get("families", {})
    for family in given.families or timm.list_modules():
        known = results.get(family)
        if known is not None and not (given.again and known["status"] != "equal"):
            continue
        results[family] = _result(family, known, given.limit)
        facts = {
            "versions": versions(),
            "machine": {**machine(), "instructions": torch.backends.cpu.get_cpu_capability()},
            "images": IMAGES,
            "tolerance": {str(k).removeprefix("torch."): v for k, v in TOLERANCE.items()},
            "limit_seconds": given.limit,
        }
        write_json(given.out, {**facts, "families": dict(sorted(results.items()))}, indent=1)
        print(json.dumps({"family": family, **results[family]}), flush=True)
    if given.out.exists():
        given.out.with_suffix(".md").write_text(table(read_json(given.out, "out")))


def _result(family: str, known: dict[str, Any] | None, limit: float) -> dict[str, Any]:
    """Choose the smallest model of a family, unless it is known, and check it."""
    result = {k: known[k] for k in ("model", "weights") if k in known} if known else {}
    if "model" not in result:
        result = _in_child(10 * limit, _smallest, family)
        if "model" not in result:
            return result or {"status": "timeout", "message": f"after {10 * limit:g} s"}
    found = _in_child(limit, _check, result["model"], result["weights"])
    return {**result, **(found or {"status": "timeout", "message": f"after {limit:g} s"})}


def _in_child(limit: float, function: Any, *arguments: Any) -> dict[str, Any]:
    """Return the result of a function that runs in a process of its own; empty after the limit."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(sender, function, arguments))
    child.start()
    sender.close()
    try:
        if not receiver.poll(limit):
            return {}
        return dict(receiver.recv())
    except EOFError:
        child.join()
        return {"status": "crashed", "message": f"exit status {child.exitcode}"}
    finally:
        child.kill()
        child.join()


def _child(sender: Connection, function: Any, arguments: tuple[Any, ...]) -> None:
    warnings.simplefilter("ignore")
    try:
        result = function(*arguments)
    except Exception as error:
        lines = str(error).splitlines() or [""]
        result = {"status": "failed", "message": f"{type(error).__name__}: {lines[0]}"}
    sender.send(result)


def _smallest(family: str) -> dict[str, Any]:
    """Return the name of the model of a family with the fewest weights, and their number."""
    best: tuple[int, str] | None = None
    for device in ("meta", "cpu"):  # some models compute with values while they are built
        for name in timm.list_models(module=family) if best is None else []:
            with contextlib.suppress(Exception), torch.device(device):
                model: nn.Module = timm.create_model(name, num_classes=CLASSES)
                found = sum(p.numel() for p in model.parameters()), name
                best = found if best is None else min(best, found)
    if best is None:
        return {"status": "failed", "message": "no model of this family can be built"}
    return {"model": best[1], "weights": best[0]}


def _check(name: str, weights: int) -> dict[str, Any]:
    """Compare gradients of a model with those of autograd, and the model with what it was."""
    start = time.perf_counter()
    dtype = torch.float32 if weights > LARGE else torch.float64
    model, images = _built(name, dtype)
    labels = torch.arange(len(images)) % CLASSES
    result: dict[str, Any] = {
        "size": images.shape[-1],
        "dtype": str(dtype).removeprefix("torch."),
    }
    names = list(select_parameters(model))[:: math.ceil(weights / LARGE)]
    _disturb_modes(model)
    before = _state(model)
    try:
        found = fastsal.per_sample_gradients(model, images, labels, parameters=names)
        with GradientEngine(model, select_parameters(model, names)) as engine:
            engine.prepare(images, labels)
            kinds = list(engine.operations.values())
    except FastsalError as error:
        message = " ".join(str(error).split())
        result |= {"status": "refused", "message": f"{type(error).__name__}: {message}"}
    else:
        slow = [kind for kind in kinds if kind.startswith("torch.func")]
        result |= {"parameters": len(found), "without_rule": len(slow)}
        result |= _compared(model, images, labels, found, TOLERANCE[dtype])
    changed = sorted(k for k, v in _state(model).items() if not _same(before[k], v))
    if changed:
        result |= {"status": "changed", "message": f"the model has other {', '.join(changed)}"}
    return {**result, "seconds": round(time.perf_counter() - start, 1)}


class FirstFeatures(nn.Module):
    """Takes features of an encoder without a classifier, means over its tokens, as classes."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> Tensor:
        tokens: Tensor = self.encoder(images)
        return tokens.mean(1)[:, :CLASSES]


def _built(name: str, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    """Build a model for the smallest images that it accepts."""
    problem: Exception | None = None
    model: nn.Module | None = None
    for size in SIZES:
        try:
            try:
                torch.manual_seed(0)
                sized: nn.Module = timm.create_model(name, num_classes=CLASSES, img_size=size)
                _disturb_weights(sized)
            except TypeError:  # the model has no argument of this name
                if model is None:
                    torch.manual_seed(0)
                    model = timm.create_model(name, num_classes=CLASSES)
                    _disturb_weights(model)
                sized = model
            sized = sized.to(dtype)
            channels = sized.default_cfg["input_size"][0]  # type: ignore[index,union-attr]
            generator = torch.Generator().manual_seed(0)
            shape = (IMAGES, channels, size, size)
            images = torch.randn(shape, generator=generator, dtype=dtype)
            _calibrate(sized, torch.randn(8, *shape[1:], generator=generator, dtype=dtype))
            with torch.no_grad():
                outputs = sized(images)
                if outputs.dim() == 3:
                    sized = FirstFeatures(sized)
                    outputs = sized(images)
        except Exception as error:
            problem = error
            continue
        if tuple(outputs.shape) == (IMAGES, CLASSES) and bool(torch.isfinite(outputs).all()):
            return sized, images
        problem = ValueError(f"outputs are {list(outputs.shape)} or not finite")
    raise problem or ValueError("no size")


def _disturb_weights(model: nn.Module) -> None:
    """Add noise to vectors and to zeros; branches that start at zero have no gradients."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif not parameter.any():
                parameter.normal_(std=0.02)


def _calibrate(model: nn.Module, images: Tensor) -> None:
    """Set running statistics; with those of an untrained model, deep gradients vanish."""
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    layers = [m for m in model.modules() if isinstance(m, kinds) and m.running_mean is not None]
    before = [layer.momentum for layer in layers]
    model.eval()
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum, layer.training = None, True
    with torch.no_grad():
        model(images)
    for layer, momentum in zip(layers, before, strict=True):
        layer.momentum = momentum
    model.eval()


def _disturb_modes(model: nn.Module) -> None:
    """Set modes and flags that must be restored."""
    model.training = True
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 5 != 0)


def _state(model: nn.Module) -> dict[str, Any]:
    modules, parameters = list(model.modules()), list(model.parameters())
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "parameters": [id(p) for p in parameters],
        "tensors": [_digest(value) for value in model.state_dict().values()],
        "modes": [module.training for module in modules],
        "flags": [p.requires_grad for p in parameters],
        "gradients": [p.grad is None for p in parameters],
        "hooks": [len(getattr(module, hook)) for module in modules for hook in hooks],
        "hooks of parameters": [len(p._backward_hooks or ()) for p in parameters],
        "attributes": [sorted(vars(module)) for module in modules],
        "random numbers": [torch.get_rng_state()],
    }


def _digest(tensor: Tensor) -> bytes:
    values = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()
    return hashlib.blake2b(values).digest()


def _same(a: list[Any], b: list[Any]) -> bool:
    if len(a) != len(b):
        return False
    return all(
        torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in zip(a, b, strict=True)
    )


def _compared(
    model: nn.Module, images: Tensor, labels: Tensor, found: dict[str, Tensor], tolerance: float
) -> dict[str, Any]:
    """Return the largest relative error over parameters and images."""
    with _plain(model) as every:
        parameters = {name: every[name] for name in found}
        worst = _largest(_alone(model, parameters, images, labels), found)
        zero = sum(not bool(rows.any()) for rows in found.values())
        result = {"status": "equal", "error": worst[0], "parameter": worst[1], "zero": zero}
        if not worst[0] <= tolerance:
            # Kernels of PyTorch may be wrong for a batch of one image.
            paired = _largest(_alone(model, parameters, images, labels, copies=2), found)
            result |= {"error_alone": worst[0], "error": paired[0], "parameter": paired[1]}
    if not result["error"] <= tolerance:
        message = f"{result['parameter']} differs by {result['error']:.1e}"
        result |= {"status": "different", "message": message}
    return result


@contextlib.contextmanager
def _plain(model: nn.Module) -> Iterator[dict[str, nn.Parameter]]:
    """Yield the weights of a model in evaluation mode, all of which require gradients."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(p, p.requires_grad) for p in model.parameters()]
    model.eval()
    for parameter, _ in flags:
        parameter.requires_grad_(True)
    try:
        yield select_parameters(model)
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode


def _alone(
    model: nn.Module,
    parameters: dict[str, nn.Parameter],
    images: Tensor,
    labels: Tensor,
    copies: int = 1,
) -> Iterable[dict[str, Tensor]]:
    """Yield the gradients of autograd of each image, in a batch of `copies` of it."""
    for image, label in zip(images, labels, strict=True):
        outputs = model(image.expand(copies, *image.shape).contiguous())
        loss = F.cross_entropy(outputs[:1], label[None])
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        yield {
            name: torch.zeros_like(p) if g is None else g
            for (name, p), g in zip(parameters.items(), gradients, strict=True)
        }


def _largest(truth: Iterable[dict[str, Tensor]], found: dict[str, Tensor]) -> tuple[float, str]:
    worst = (0.0, "")
    for i, gradients in enumerate(truth):
        norms = {name: float(g.norm()) for name, g in gradients.items()}
        noise = NOISE * max(norms.values())
        for name, gradient in gradients.items():
            difference = float((found[name][i] - gradient).norm())
            error = difference / (norms[name] + noise) if difference else 0.0
            worst = max(worst, (math.inf if math.isnan(error) else error, name))
    return worst


def table(record: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    families = record["families"]
    equal = sum(result["status"] == "equal" for result in families.values())
    about, used = record["machine"], record["versions"]
    lines = [
        "# Families of timm",
        "",
        f"Per-sample gradients equal those of autograd for {equal} of {len(families)} families "
        f"(`make sweep`; timm {used['timm']}, PyTorch {used['torch']}, {about['processor']}, "
        f"{about['instructions']}). One model of each family, the one with the fewest weights, "
        f"with random weights and {record['images']} random images of the smallest size that it "
        "accepts. The error is the largest relative error over parameters and images. "
        "Parameters without a rule are differentiated by `torch.func`; those that are zero have no "
        "gradient at any image, by autograd too.",
        "",
        "| family | model | weights | size | type | parameters | no rule | zero | error | result |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for family, r in families.items():
        error = f"{r['error']:.0e}" if r.get("error") is not None else ""
        result = r["status"] + (f": {r['message']}" if "message" in r else "")
        if "error_alone" in r and r["status"] == "equal":
            result += f"; autograd of a batch of one image differs by {r['error_alone']:.0e}"
        weights = f"{r['weights']:,}" if "weights" in r else ""
        cells = [family, r.get("model", ""), weights]
        columns = ("size", "dtype", "parameters", "without_rule", "zero")
        cells += [str(r.get(k, "")) for k in columns]
        lines.append("| " + " | ".join([*cells, error, result.replace("|", "\\|")]) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
