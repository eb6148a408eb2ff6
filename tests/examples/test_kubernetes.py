"""Manifests against the schema of the Kubernetes API, and against the command line they call."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

from minicache_trt.cli.serve import serve
from minicache_trt.serving.engine_metrics import GAUGES, PREFIX

FOLDER = Path(__file__).parents[2] / "examples" / "kubernetes"
FILES = ["autoscaling", "deployment", "model", "triton"]
yaml = pytest.importorskip("yaml")
schemas = pytest.importorskip("kubernetes_validate")


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / f"{name}.yaml").read_text(encoding="utf-8")))


@pytest.mark.parametrize("name", FILES)
def test_manifests_are_what_the_api_takes(name: str) -> None:
    for document in documents(name):
        schemas.validate(document, "1.31", strict=True)


def test_a_wrong_manifest_would_be_seen() -> None:
    document = documents("deployment")[0]
    document["spec"]["template"]["spec"]["containers"][0]["readinessProbe"]["httpget"] = {}
    with pytest.raises(schemas.ValidationError):
        schemas.validate(document, "1.31", strict=True)


def test_every_file_is_checked() -> None:
    others = {"prometheus-adapter-values"}
    assert {path.stem for path in FOLDER.glob("*.yaml")} == {*FILES, *others}


def test_arguments_are_options_of_the_command() -> None:
    (container,) = documents("deployment")[0]["spec"]["template"]["spec"]["containers"]
    command, verb, *arguments = container["args"]
    assert (command, verb) == ("minicache-trt", "serve")
    names = {argument.split("=")[0].removeprefix("--").replace("-", "_") for argument in arguments}
    assert names <= set(inspect.signature(serve).parameters)
    assert container["startupProbe"]["httpGet"]["path"] == "/health"


def test_pods_and_selectors_belong_together_and_the_metric_exists() -> None:
    deployment, service, budget = documents("deployment")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    selectors = (deployment["spec"]["selector"]["matchLabels"], service["spec"]["selector"])
    assert all(
        selector.items() <= labels.items() for selector in (*selectors, budget["spec"]["selector"]["matchLabels"])
    )
    (scaler,) = documents("autoscaling")
    metric = scaler["spec"]["metrics"][0]["pods"]["metric"]["name"]
    assert metric.removeprefix(PREFIX) in GAUGES
    adapter = (FOLDER / "prometheus-adapter-values.yaml").read_text(encoding="utf-8")
    assert yaml.safe_load(adapter)["rules"]["custom"][0]["name"]["as"] == metric
