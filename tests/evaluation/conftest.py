"""Tasks of our own for lm-eval-harness: a folder with YAML files and their documents."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
metadata: {{version: 1.0}}
{body}"""
BODIES = {
    "local_choice": "output_type: multiple_choice\ndoc_to_text: '{{context}}'\ndoc_to_choice: choices\n"
    "doc_to_target: label\nmetric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n",
    "local_text": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
    "metric_list: [{metric: byte_perplexity, aggregation: weighted_perplexity, higher_is_better: false}]\n",
    "local_answer": "output_type: generate_until\ndoc_to_text: '{{context}}'\ndoc_to_target: '{{answer}}'\n"
    "generation_kwargs: {until: ['='], max_gen_toks: 8, do_sample: false}\n"
    "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n",
}


@pytest.fixture(scope="session")
def task_folder(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """Multiple choice, rolling text and generation over the same six documents, some longer than the context."""
    folder = tmp_path_factory.mktemp("tasks")
    source = (Path(__file__).parents[2] / "minicache_trt" / "contract.py").read_text()
    with (folder / "documents.jsonl").open("w") as file:
        for index in range(6):
            piece = source[index * 900 : (index + 1) * 900 + 250 * index]
            document = {
                "context": piece[: 200 + 150 * index],
                "choices": [piece[-20:], " self.", " return None", "\n\n"],
                "label": index % 4,
                "text": piece,
                "answer": "x",
            }
            file.write(json.dumps(document) + "\n")
    for name, body in BODIES.items():
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, data=folder / "documents.jsonl", body=body))
    return folder
