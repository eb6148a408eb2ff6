"""Lengths, arrivals, prompts and files: distributions, seeds, and what is refused."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minicache_trt.errors import UserError
from minicache_trt.load.lengths import LogNormal, Uniform
from minicache_trt.load.loads import WARM_UP, Load, Sweep, all_loads
from minicache_trt.load.slo import parse_slo
from minicache_trt.load.sources import SourceOptions, open_source
from minicache_trt.load.text import MeasuredText, TokenizedText, open_tokenizer, tokens_per_word

DEMO = Path(__file__).parents[2] / "examples" / "demo_model" / "checkpoint"
WORDS = MeasuredText(2.0)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_log_normal() -> None:
    """Median and mean are those of the formulas in its docstring; the tail is cut."""
    draws = LogNormal(220, 1.0, 10**9).draw(rng(), 40_000)
    assert statistics.fmean(draws) == pytest.approx(220, rel=0.03)
    assert statistics.median(draws) == pytest.approx(220 * math.exp(-0.5), rel=0.03)
    logs = np.log(draws)
    assert np.std(logs) == pytest.approx(1.0, rel=0.03)
    cut = LogNormal(220, 1.0, 500).draw(rng(), 1000)
    assert max(cut) == 500 and min(cut) >= 1
    assert LogNormal(7, 0.0, 100).draw(rng(), 3) == [7, 7, 7]


def test_uniform() -> None:
    assert Uniform(50).draw(rng(), 3) == [50, 50, 50]
    draws = Uniform(100, 0.25).draw(rng(), 2000)
    assert (min(draws), max(draws)) == (75, 125) and len(set(draws)) == 51
    assert min(Uniform(1, 0.9).draw(rng(), 50)) == 1


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_arrivals(burstiness: float) -> None:
    """Gamma gaps: mean 1 / rate, coefficient of variation 1 / sqrt(burstiness); 1 is the Poisson process."""
    times = Load(5.0, burstiness).arrivals(rng(), 30_000)
    gaps = np.diff(times)
    assert times[0] == 0 and (gaps >= 0).all()
    assert gaps.mean() == pytest.approx(0.2, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(burstiness**-0.5, rel=0.05)
    if burstiness == 1:
        assert np.mean(gaps > 0.2) == pytest.approx(math.exp(-1), abs=0.01)


def test_all_at_once() -> None:
    assert Load().arrivals(rng(), 3) == [0.0, 0.0, 0.0]


def test_a_sweep_is_every_combination() -> None:
    loads = all_loads([1.0, math.inf], [None, 8], 0.5)
    assert [(load.request_rate, load.max_concurrency) for load in loads] == [
        (1.0, None), (1.0, 8), (math.inf, None), (math.inf, 8),
    ]  # fmt: skip
    assert [load.label for load in loads] == [
        "unlimited at once, 1/s",
        "8 at once, 1/s",
        "unlimited at once",
        "8 at once",
    ]


@pytest.mark.parametrize("name", ["sharegpt-like", "random", "shared-prefix"])
def test_seeds(name: str) -> None:
    """The same seed gives the same requests; points, the warm-up and other seeds share no prompt."""
    options = SourceOptions(name, prefix_len=20)

    def draw(seed: int, point: int) -> list[Any]:
        sweep = Sweep((Load(),), seed=seed)
        return open_source(options, WORDS, seed).draw(sweep.generator(point), 20)

    assert draw(1, 0) == draw(1, 0)
    drawn = [{request.prompt for request in draw(seed, point)} for seed in (1, 2) for point in (WARM_UP, 0, 1)]
    assert sum(map(len, drawn)) == len(set().union(*drawn)) == 120


def test_random_has_the_lengths_asked_for() -> None:
    requests = open_source(SourceOptions("random", input_len=40, output_len=9), WORDS, 0).draw(rng(), 5)
    assert {len(request.prompt.split()) for request in requests} == {20}, "two tokens a word"
    assert {request.output_len for request in requests} == {9}


def test_shared_prefixes() -> None:
    options = SourceOptions("shared-prefix", input_len=10, prefix_len=60, num_prefixes=2)
    requests = open_source(options, WORDS, 0).draw(rng(), 6)
    begins = [" ".join(request.prompt.split()[:30]) for request in requests]
    assert begins[0::2] == [begins[0]] * 3 and begins[1::2] == [begins[1]] * 3 and begins[0] != begins[1]
    assert len({request.prompt for request in requests}) == 6
    assert {len(request.prompt.split()) for request in requests} == {35}


def test_tokens_per_word_leaves_out_what_every_prompt_gets() -> None:
    assert tokens_per_word((16, 16 * 3 + 7), (64, 64 * 3 + 7)) == 3
    assert tokens_per_word((16, 9), (64, 9)) is None


def test_tokenizer_cuts_to_size() -> None:
    text = open_tokenizer(str(DEMO))
    for tokens in (1, 17, 300):
        made = text.make(rng(tokens), tokens)
        assert abs(len(text.tokenizer.encode(made)) - tokens) <= 2
        assert text.count(made) == len(text.tokenizer.encode(made))


class OneToken:
    """A tokenizer to which every text is one token."""

    def encode(self, text: str) -> list[int]:
        return [0]

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
        return "x"


def test_a_tokenizer_that_never_gets_there() -> None:
    assert TokenizedText(OneToken()).make(rng(), 400_000) == "x"


def read(path: Path, content: object, **options: Any) -> list[tuple[str, int]]:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    source = open_source(SourceOptions(dataset_path=path, **options), WORDS, 0)
    count = options.pop("count", 3)
    return sorted((request.prompt, request.output_len) for request in source.draw(rng(), count))


def test_sharegpt_file(tmp_path: Path) -> None:
    turns = [[("human", "a b c"), ("gpt", "one two"), ("human", "ignored")], [("human", "alone")]]
    turns += [[("human", "d e"), ("gpt", "three")], [("human", "w " * 900), ("gpt", "long prompt")]]
    data = [{"id": i, "conversations": [{"from": a, "value": b} for a, b in turn]} for i, turn in enumerate(turns)]
    expected = [("a b c", 4), ("d e", 2)]
    assert sorted(set(read(tmp_path / "sharegpt.json", data))) == expected, "two tokens a word; too long is left out"
    assert set(read(tmp_path / "sharegpt.json", data, output_len=7)) == {("a b c", 7), ("d e", 7)}
    assert set(read(tmp_path / "sharegpt.json", data, max_output_len=3)) == {("a b c", 3), ("d e", 2)}


def test_lines(tmp_path: Path) -> None:
    lines = [
        {"prompt": "one", "output_len": 5},
        {"text_input": "two", "max_tokens": 6},
        {"text": "three", "answer": "x y"},
    ]
    content = "\n\n".join(map(json.dumps, lines)) + "\n"
    assert read(tmp_path / "a.jsonl", content) == [("one", 5), ("three", 4), ("two", 6)]
    assert read(tmp_path / "a.jsonl", '"one"\n"two"\n"three"', output_len=2) == [("one", 2), ("three", 2), ("two", 2)]


def test_a_file_repeats_only_when_it_is_used_up(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(f'"prompt {index}"' for index in range(10)))
    source = open_source(SourceOptions(dataset_path=path, output_len=1), WORDS, 3)
    drawn = [request.prompt for _ in range(3) for request in source.draw(rng(), 4)]
    assert len(set(drawn[:10])) == 10 and drawn[10:] == drawn[:2]
    assert drawn[:10] != sorted(drawn[:10]), "shuffled"


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("{", "line 1: not JSON"),
        ('{"prompt": "a"}', "does not say how long its answer is"),
        ('{"prompt": "a", "max_tokens": "9"}', "expected a positive number of output tokens, got '9'"),
        ('{"prompt": "a", "max_tokens": true}', "expected a positive number of output tokens, got True"),
        ('{"promt": "a"}', "line 1 has no prompt"),
        ("3", "expected an object or a string, got int"),
        ("[]", "no prompt of at most 1024 tokens"),
        ('[{"conversations": 3}]', "no prompt of at most 1024 tokens"),
        ("", "no prompt of at most 1024 tokens"),
    ],
)
def test_bad_files(tmp_path: Path, content: str, part: str) -> None:
    with pytest.raises(UserError, match=part):
        read(tmp_path / "a.jsonl", content)


def test_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"\xff\xfe")
    for name, part in (("latin", "not UTF-8"), ("nowhere", "No such file"), (".", "Is a directory")):
        with pytest.raises(UserError, match=part):
            open_source(SourceOptions(dataset_path=tmp_path / name), WORDS, 0)
    for name, part in ((str(tmp_path), "has no tokenizer files"), (str(tmp_path / "none"), "cannot load")):
        with pytest.raises(UserError, match=part):
            open_tokenizer(name)


def test_objectives() -> None:
    slo = parse_slo(["ttft=500ms, itl=0.05s", "tpot:40"])
    assert slo is not None and dict(slo.limits) == pytest.approx({"ttft": 0.5, "itl": 0.05, "tpot": 0.04})
    assert parse_slo([]) is None
    for text in ("ttft", "ttft=", "speed=3", "ttft=-1", "ttft=0", "ttft=1h", "", "ttft=1,,"):
        with pytest.raises(UserError, match="--slo: expected limits"):
            parse_slo([text])


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: Load(0), "request_rate"),
        (lambda: Load(math.nan), "request_rate"),
        (lambda: Load(1, 0), "burstiness"),
        (lambda: Load(1, 1, 0), "max_concurrency"),
        (lambda: Sweep(()), "loads"),
        (lambda: Sweep((Load(),), 0), "num_prompts"),
        (lambda: Sweep((Load(),), 1, -1), "num_warmups"),
        (lambda: SourceOptions("shargpt"), "dataset_name"),
        (lambda: SourceOptions(input_len=0), "input_len"),
        (lambda: SourceOptions(output_len=0), "output_len"),
        (lambda: SourceOptions(range_ratio=1.0), "range_ratio"),
        (lambda: SourceOptions(sigma=math.nan), "sigma"),
    ],
)
def test_bad_values(make: Any, field: str) -> None:
    with pytest.raises(ValueError, match=f"^{field}: expected"):
        make()
