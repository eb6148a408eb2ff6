"""Examples of the long-range tasks: what is asked for was told, once, and the spans are exactly the answers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from minicache_trt.errors import UserError
from minicache_trt.evaluation import examples
from minicache_trt.evaluation.examples import Example, Source
from minicache_trt.evaluation.tasks import TASKS, Settings, make_cells
from minicache_trt.evaluation.text import TokenizedText, read_documents

BEGIN = [9999]


def encode(text: str) -> list[int]:
    """A token per character."""
    return [ord(character) for character in text]


def text_of(tokens: list[int]) -> str:
    return "".join(map(chr, tokens))


@pytest.fixture
def source() -> Source:
    return Source(encode, list(range(2000, 2100)), BEGIN, np.array(encode("abc xyz. " * 300)))


def answers(example: Example) -> list[str]:
    return [text_of(example.tokens[start:stop]) for start, stop in example.answers]


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_passkey(source: Source, depth: float) -> None:
    example = examples.passkey(source, np.random.default_rng(0), 400, depth)
    text, (key,) = text_of(example.tokens[1:]), answers(example)
    assert len(example.tokens) == 400 and example.tokens[:1] == BEGIN
    assert key.isdecimal() and len(key) == 5 and text.endswith(f"The pass key is {key}")
    assert text.count(f"The pass key is {key}. Remember it.") == 1 and text.count(key) == 2
    before = text.index("\n# The pass key is")
    after = text.index("\n# What is") - text.index("Remember it.\n") - len("Remember it.\n")
    assert before == round(depth * (before + after))
    assert example.prompt is not None and text_of(example.tokens[example.prompt :]).startswith("\n# What is")


@pytest.mark.parametrize(("length", "queries"), [(300, 1), (300, 6), (431, 3)])
def test_key_values(source: Source, length: int, queries: int) -> None:
    example = examples.key_values(source, np.random.default_rng(1), length, queries)
    assert len(example.tokens) == length and len(example.answers) == queries and example.prompt is not None
    told, asked = text_of(example.tokens[1 : example.prompt]), text_of(example.tokens[example.prompt :])
    pairs = dict(line.split(" = ") for line in told[told.index("\nkey_") + 1 :].split("\n"))
    lines = asked.strip("\n").split("\n")
    assert len(lines) == queries == len(set(lines)) and len(pairs) >= queries
    for line, answer in zip(lines, answers(example), strict=True):
        name, value = line.split(" = ")
        assert pairs[name] == value == answer
    # One more pair would not have fitted.
    assert length - 1 - len(told) - len(asked) + told.index("\nkey_") < len("\nkey_1234 = 12345")


def test_repeated_and_copied(source: Source) -> None:
    rng = np.random.default_rng(2)
    example = examples.repeated(source, rng, 200, 30)
    body = example.tokens[1:]
    assert len(example.tokens) == 200 and body[:30] == body[30:60] and body[150:180] == body[:30]
    # The first repeated token cannot be known, so the second is the first that is scored.
    assert example.answers == ((32, 200),) and example.prompt is None
    example = examples.copied(source, rng, 200, 30)
    assert example.tokens[1:31] == example.tokens[170:] and set(example.tokens[31:170]) <= set(encode("abcxyz. "))
    assert example.answers == ((171, 200),) and example.prompt == 170


def test_impossible_spans_are_refused() -> None:
    for spans in (((0, 2),), ((2, 2),), ((3, 5),), ((2, 4), (3, 4))):
        with pytest.raises(ValueError, match="answers: expected"):
            Example([1, 2, 3, 4], spans)
    with pytest.raises(ValueError, match="prompt: expected"):
        Example([1, 2, 3, 4], ((1, 2),), 4)


class Characters:
    """A tokenizer of characters."""

    bos_token_id, eos_token_id, all_special_ids = 1, 2, [1, 2]

    def __len__(self) -> int:
        return 128

    def __call__(self, texts: list[str], **_: object) -> dict[str, list[list[int]]]:
        return {"input_ids": [encode(text) for text in texts]}

    def encode(self, text: str, **_: object) -> list[int]:
        return encode(text)


def tokenized(text: str) -> TokenizedText:
    return TokenizedText(Characters(), [text, text], 128)


def test_windows_cover_the_text() -> None:
    text = tokenized("".join(chr(97 + i % 26) for i in range(500)))
    windows = text.windows(101, 100, 40)
    assert len(windows) == 1002 // 100
    assert all(w.tokens[0] == 1 and len(w.tokens) == 101 and w.answers == ((40, 101),) for w in windows)
    assert windows[0].tokens[1:] == text.ids[:100].tolist() and windows[-1].tokens[1:] == text.ids[-100:].tolist()
    assert text.ids[500] == 2


def test_every_task_is_the_same_each_time() -> None:
    settings = Settings(length=300, windows=2, examples=3, segment=40, queries=2, lengths=(300, 350), depths=(0, 1))
    first, again = (make_cells(list(TASKS), tokenized("some text to read. " * 60), settings, 128) for _ in range(2))
    assert first == again
    assert [(c.length, c.depth, len(c.examples)) for c in first["passkey"]] == [
        (300, 0, 2), (300, 1, 2), (350, 0, 2), (350, 1, 2),
    ]  # fmt: skip
    assert [(c.length, len(c.examples)) for c in first["keyvalue"]] == [(300, 3), (350, 3)]
    other = make_cells(["repeat"], tokenized("some text to read. " * 60), Settings(length=300, seed=1), 128)
    assert other["repeat"][0].examples[0] != first["repeat"][0].examples[0]


@pytest.mark.parametrize("task", list(TASKS))
def test_too_short_is_said(task: str) -> None:
    with pytest.raises(UserError):
        make_cells([task], tokenized("x" * 4000), Settings(length=100), 128)


def test_too_little_text_is_said(tmp_path: object) -> None:
    with pytest.raises(UserError, match="tokens are too few for a window of 512"):
        tokenized("x" * 200).windows(512, 3, 129)
    with pytest.raises(UserError, match="no text in it"):
        TokenizedText(Characters(), [], 128)
    with pytest.raises(UserError, match="beyond the model's vocabulary of 100"):
        TokenizedText(Characters(), ["xyz"], 100)


@pytest.mark.parametrize(
    "make", [lambda: Settings(length=0), lambda: Settings(depths=(2.0,)), lambda: Settings(lengths=(5, -1))]
)
def test_settings_are_checked(make: Callable[[], Settings]) -> None:
    with pytest.raises(ValueError, match="expected"):
        make()


def test_documents(tmp_path: object) -> None:
    from pathlib import Path

    file = Path(str(tmp_path)) / "text.txt"
    file.write_bytes(b"one\n\0two\nlines\n\0")
    assert read_documents(file) == ["one", "two\nlines"]
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        read_documents(file)
