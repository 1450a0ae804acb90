"""`--device` and `--amp`: which commands have them, and how they are refused."""

from __future__ import annotations

import click
import pytest
import torch
from click.testing import CliRunner

from fastsal.cli import main, torchrun
from fastsal.errors import InvalidArgument

WITH_DEVICE = {
    "prune", "score", "compensate", "eval", "finetune", "transfer", "sweep", "plan", "demo",
    "measure",
}  # fmt: skip
WITH_AMP = WITH_DEVICE - {"sweep", "demo", "measure"}  # a study says it in its file


def names(option):
    return {
        name
        for name, command in main.commands.items()
        for param in command.params
        if isinstance(param, click.Option) and option in param.opts
    }


def test_commands_that_run_a_model():
    assert names("--device") == WITH_DEVICE
    assert names("--amp") == names("--autocast") == WITH_AMP


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "CPU"])
def test_a_name_of_no_device(name):
    found = CliRunner().invoke(main, ["eval", "resnet18", "--data", "x", "--device", name])
    assert found.exit_code == 2
    message = f"error: --device must be auto, cpu, cuda, cuda:N or mps, got {name!r}"
    assert found.stderr.startswith(message)


@pytest.mark.parametrize("command", ["eval", "sweep"])
def test_a_device_that_is_not_there(monkeypatch, tiny_file, tiny_npz, tmp_path, command):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    given = ["eval", f"{tiny_file}:tiny", "--data", str(tiny_npz)]
    if command == "sweep":
        pytest.importorskip("pyarrow")
        study = tmp_path / "study.toml"
        study.write_text(
            'name = "a"\nsparsities = [0.5]\n[[models]]\nmodel = "tiny.py:tiny"\n[[tasks]]\n'
            'name = "t"\ndata = "tiny.npz"\n[[sources]]\ntasks = ["t"]\n[[criteria]]\n'
            'criterion = "magnitude"\n'
        )
        given = ["sweep", str(study), "--out", str(tmp_path / "out")]
    found = CliRunner().invoke(main, [*given, "--device", "cuda:1"])
    assert found.exit_code == 2
    lines = found.stderr.splitlines()
    assert lines[-1] == "error: device must be one of this machine, got 'cuda:1'; it has cpu"
    assert not (tmp_path / "out").exists()


@pytest.fixture
def job(monkeypatch):
    """Stands for a process under torchrun on a machine with GPUs; records what is set up."""
    found = {}
    monkeypatch.setattr(torch.cuda, "set_device", lambda place: found.update(place=place))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)

    def make(gpus, rank=0, processes=1):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        for name, value in (("RANK", rank), ("WORLD_SIZE", processes)):
            monkeypatch.setenv(f"LOCAL_{name}", str(value))
        return found

    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda kind: found.update(b=kind))
    monkeypatch.setattr("fastsal.distributed.ranks.Ranks", stop)
    return make


class Stopped(Exception):
    pass


def stop():
    raise Stopped


def backend(found, device):
    with pytest.raises(Stopped), torchrun.joined(device):
        pass
    return found["b"]


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_each_process_has_a_gpu(job, device):
    found = job(4, rank=3, processes=4)
    assert backend(found, device) == "nccl"
    assert found["place"] == 3


@pytest.mark.parametrize(("device", "gpus"), [("auto", 0), ("cpu", 4)])
def test_jobs_on_cpus(job, device, gpus):
    found = job(gpus, rank=3, processes=4)
    assert backend(found, device) == "gloo"
    assert "place" not in found


def test_one_process_of_a_machine_may_choose(job):
    found = job(2)
    assert backend(found, "cuda:1") == "nccl"
    assert found["place"] == torch.device("cuda", 1)


@pytest.mark.parametrize(
    ("device", "gpus", "message"),
    [
        ("cuda:1", 4, "--device must be auto, cpu or cuda under torchrun, got 'cuda:1', which 4 "),
        ("auto", 2, "--device must be cpu for more processes than GPUs, got 'auto' for 4 proc"),
        ("cuda", 0, "device must be one of this machine, got 'cuda'; it has cpu"),
    ],
)
def test_jobs_that_cannot_be(job, device, gpus, message):
    job(gpus, rank=3, processes=4)
    with pytest.raises(InvalidArgument, match=message), torchrun.joined(device):
        pass
