"""Names of models on the Hugging Face Hub, without access to it."""

from __future__ import annotations

import pytest
import torch

from fastsal.errors import FastsalError, InvalidArgument
from fastsal.models.loading import load_model


@pytest.fixture
def offline(monkeypatch):
    """Every request to the Hub fails, as without a network."""
    calls = []

    class ConnectError(Exception):
        pass

    ConnectError.__module__ = "httpx"

    def fail(*args, **kwargs):
        calls.append(args)
        raise ConnectError("\x1b[1m[Errno -2]\x1b[0m Name or service not known\nmore lines")

    for name in ("load_model_config_from_hf", "load_state_dict_from_hf", "download_cached_file"):
        for module in ("_factory", "_builder", "_hub"):
            monkeypatch.setattr(f"timm.models.{module}.{name}", fail, raising=False)
    return calls


@pytest.mark.parametrize(
    "name",
    ["timm/test_resnet.r160_in1k", "hf-hub:timm/test_resnet.r160_in1k", "hf_hub:timm/test_resnet",
     "timm/test_resnet"],
)  # fmt: skip
def test_models_of_timm_by_their_names_on_the_hub(offline, name):
    expected = load_model("test_resnet", seed=1).state_dict()
    found = load_model(name, seed=1).state_dict()
    assert not offline
    assert all(torch.equal(found[n], value) for n, value in expected.items())


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("timm/test_resnet.r160_in1k", "pretrained"),
        ("hf-hub:timm/test_resnet.r160_in1k", "pretrained"),
        ("hf-hub:someone/model", "pretrained"),
        ("hf-hub:someone/model", None),
        ("test_resnet", "pretrained"),
    ],
)
def test_an_unreachable_hub_is_told_in_one_line(offline, name, weights):
    with pytest.raises(FastsalError, match=r"cannot be downloaded .*; check the connection") as e:
        load_model(name, weights=weights)
    assert offline
    assert name in str(e.value)
    assert "\x1b" not in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("RepositoryNotFoundError", "no such model, or it is private .log in"),
        ("GatedRepoError", "its owner restricts access"),
        ("RevisionNotFoundError", "no such revision"),
        ("EntryNotFoundError", "no configuration or weights in timm's format"),
        ("HFValidationError", "they are OWNER/NAME"),
    ],
)
def test_what_the_hub_does_not_have_is_told(monkeypatch, kind, message):
    error = type(kind, (Exception,), {"__module__": "huggingface_hub.errors"})

    def fail(*args, **kwargs):
        raise error("401 Client Error. (Request ID: abc)\n\nRepository Not Found for url: ...")

    monkeypatch.setattr("timm.create_model", fail)
    with pytest.raises(InvalidArgument, match=f"model: 'hf-hub:someone/model': .*{message}"):
        load_model("hf-hub:someone/model")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm/resnet1b", "got 'timm/resnet1b'; did you mean 'resnet1"),
        ("hf-hub:timm/test_resnet.nothing", None),
        ("someone/model", "got 'someone/model'; did you mean 'hf-hub:someone/model'"),
        ("ftp:someone/model", "model must be a timm name, hf-hub:OWNER/NAME or .*got 'ftp:some"),
        ("hf-hub:", "model must be a timm name, hf-hub:OWNER/NAME"),
        ("hf-hub:model", "model must be a timm name, hf-hub:OWNER/NAME"),
        ("local-dir:nowhere", "there is no folder nowhere with a config.json"),
        ("./model", "model must be a timm name"),
        ("", "model must be a timm name"),
        ("test_resnet.nothing", "model must be|test_resnet.nothing"),
        ("bold\x1b[1m", "got 'bold"),
    ],
)
def test_other_names_are_refused(offline, name, message):
    with pytest.raises(FastsalError, match=message) as error:
        load_model(name)
    assert "\x1b" not in str(error.value)


def test_pretrained_weights_that_do_not_exist():
    with pytest.raises(InvalidArgument, match="model: 'resnet18.nothing': Invalid pretrained tag"):
        load_model("resnet18.nothing", weights="pretrained")
