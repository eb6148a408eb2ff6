"""Downloads: which files are asked for, and what each failure says. The hub itself is replaced."""

import errno
import json
import re
import shutil
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors
from safetensors.torch import load_file

from minicache_trt.checkpoint import load_checkpoint, resolve_config
from minicache_trt.checkpoint.hub import is_hub_id
from minicache_trt.errors import UserError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path, monkeypatch, save_model):
    """A hub with one model under any name; returns the calls it got."""
    directory, _ = save_model()
    snapshot = tmp_path / COMMIT
    snapshot.mkdir()
    calls = []

    def snapshot_download(repo_id, **options):
        calls.append((repo_id, options))
        for path in directory.iterdir():
            if any(path.match(pattern) for pattern in options["allow_patterns"]):
                shutil.copy(path, snapshot)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return SimpleNamespace(calls=calls, snapshot=snapshot, directory=directory)


@pytest.mark.parametrize(
    ("model", "repository"),
    [
        ("org/name", "org/name"),
        ("llama2-7b", "meta-llama/Llama-2-7b-hf"),
        ("https://huggingface.co/org/name/", "org/name"),
    ],
)
def test_download(hub, model, repository):
    checkpoint = load_checkpoint(model, revision="v1", token="secret")
    assert [call[0] for call in hub.calls] == [repository, repository]
    assert hub.calls[0][1]["revision"] == "v1" and hub.calls[1][1]["revision"] == COMMIT
    assert all(call[1]["token"] == "secret" for call in hub.calls)
    assert not any("safetensors" in pattern for pattern in hub.calls[0][1]["allow_patterns"])
    assert checkpoint.revision == COMMIT and checkpoint.directory == hub.snapshot
    assert checkpoint.source == model and checkpoint.config.hidden_size == 64


def test_unsupported_model_is_refused_before_its_weights_are_downloaded(hub):
    (hub.directory / "config.json").write_text(json.dumps({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}))
    with pytest.raises(UserError, match="GPT2LMHeadModel"):
        load_checkpoint("org/name")
    assert len(hub.calls) == 1 and not (hub.snapshot / "model.safetensors").exists()


def test_config_alone(hub):
    assert resolve_config("org/name").hidden_size == 64
    assert sorted(path.name for path in hub.snapshot.iterdir()) == ["config.json", "generation_config.json"]


def test_dummy_of_a_hub_model_downloads_no_weights(hub, tmp_path):
    (hub.directory / "tokenizer.json").write_text("{}")
    checkpoint = load_checkpoint("org/name", load_format="dummy", work_dir=tmp_path / "dummy")
    assert checkpoint.dummy and checkpoint.revision == COMMIT
    assert not (hub.snapshot / "model.safetensors").exists()
    assert [path.name for path in checkpoint.sidecar_files()] == ["generation_config.json", "tokenizer.json"]


def http_error(kind, status):
    return kind("boom\nmore", response=SimpleNamespace(status_code=status, headers={}, request=None))


def caused(error, cause):
    error.__cause__ = cause
    return error


FAILURES = [
    (http_error(errors.GatedRepoError, 401), "access .* is restricted", "huggingface.co/org/name.*HF_TOKEN"),
    (http_error(errors.GatedRepoError, 403), "access .* is restricted", "HF_TOKEN"),
    (
        caused(errors.LocalEntryNotFoundError("x"), http_error(errors.HfHubHTTPError, 403)),
        "access .* is restricted",
        "ask for access",
    ),
    (http_error(errors.RepositoryNotFoundError, 404), "no such directory here, and no such repository", "spelling"),
    (http_error(errors.RevisionNotFoundError, 404), "no revision 'v1'", "branch, tag or commit"),
    (http_error(errors.HfHubHTTPError, 401), "refused the access token", "valid token"),
    (http_error(errors.HfHubHTTPError, 429), "too many requests", "wait"),
    (http_error(errors.DisabledRepoError, 403), "restricted|disabled", "."),
    (http_error(errors.HfHubHTTPError, 503), "cannot be reached", "network"),
    (errors.HFValidationError("x"), "not a valid name", "organisation/name"),
    (errors.LocalEntryNotFoundError("x"), "cannot be reached, and the local cache does not hold", "HF_HUB_OFFLINE"),
    (errors.OfflineModeIsEnabled("x"), "cannot be reached", "local directory"),
    (TimeoutError("x"), "cannot be reached", "network"),
    (ConnectionResetError("x"), "cannot be reached", "network"),
    (OSError(errno.ENOSPC, "No space left on device"), "the disk is full", "HF_HOME"),
    (RuntimeError("IO Error: No space left on device (os error 28)"), "the disk is full", "HF_HOME"),
    (PermissionError(errno.EACCES, "Permission denied"), "the hub cache cannot be written", "HF_HOME"),
]


@pytest.mark.parametrize(("failure", "cause", "remedy"), FAILURES)
def test_failures(monkeypatch, failure, cause, remedy):
    def fail(*arguments, **options):
        raise failure

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError, match=cause) as caught:
        load_checkpoint("org/name", revision="v1")
    assert caught.value.cause.startswith("org/name: ") and "\n" not in str(caught.value)
    assert re.search(remedy, caught.value.remedy)


def test_a_defect_is_not_explained_away(monkeypatch):
    def fail(*arguments, **options):
        raise KeyError("defect")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(KeyError, match="defect"):
        load_checkpoint("org/name")


@pytest.mark.parametrize(
    ("name", "expected"),
    [("org/name", True), ("a-b/c.d_e-1", True), ("name", False), ("a/b/c", False), ("./a", False), ("/a", False)],
)
def test_hub_id(name, expected):
    assert is_hub_id(name) is expected


def test_pytorch_weights_where_there_are_no_others(hub, tmp_path):
    weights = hub.directory / "model.safetensors"
    torch.save(load_file(weights), hub.directory / "pytorch_model.bin")
    assert load_checkpoint("org/name").directory == hub.snapshot and not (hub.snapshot / "pytorch_model.bin").exists()
    expected = load_file(weights)["model.norm.weight"].numpy()
    weights.unlink()
    (hub.snapshot / "model.safetensors").unlink()
    checkpoint = load_checkpoint("org/name", work_dir=tmp_path / "work")
    assert checkpoint.format == "PyTorch checkpoint" and checkpoint.origin == hub.snapshot
    assert checkpoint.revision == COMMIT and (checkpoint.weights["norm.weight"].numpy() == expected).all()
