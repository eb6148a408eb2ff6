"""Examples of the long-range tasks: token sequences and the spans of them that are scored.

Every example is a sequence of exactly ``length`` tokens. What is scored can be known only from tokens far back, so the
score falls when the cache no longer tells tokens apart. Parts are tokenized apart from each other, so that a value has
the same tokens where it is given and where it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Tokens = list[int]
Encode = Callable[[str], Tokens]
Span = tuple[int, int]

NEEDLE = ("\n# The pass key is ", ". Remember it.\n")
QUESTION = "\n# What is the pass key? The pass key is "
PAIR = ("\nkey_", " = ")


@dataclass(frozen=True)
class Example:
    """A sequence of tokens and the half-open spans of it that are answers.

    Parameters
    ----------
    tokens : list of int
    answers : tuple of pairs
    prompt : int, optional
        Tokens that are prefilled at once, as a prompt is; the others are decoded one by one. Default: only as many as
        are not compressed in any case, so that everything after them reads compressed history.
    """

    tokens: Tokens
    answers: tuple[Span, ...]
    prompt: int | None = None

    def __post_init__(self) -> None:
        """Answers must lie behind the first token, in order, inside the sequence."""
        edge = 1
        if self.prompt is not None and not 1 <= self.prompt < len(self.tokens):
            raise ValueError(f"prompt: expected 1 to {len(self.tokens) - 1} tokens, got {self.prompt}")
        for start, stop in self.answers:
            if not edge <= start < stop <= len(self.tokens):
                raise ValueError(f"answers: expected ascending spans in [1, {len(self.tokens)}), got {self.answers}")
            edge = stop


@dataclass(frozen=True)
class Source:
    """What examples are made of.

    Parameters
    ----------
    encode : callable
        Text to token ids, without special tokens.
    ordinary : sequence of int
        Token ids random segments are drawn from.
    begin : list of int
        What every sequence begins with: the BOS token, or nothing.
    filler : array of int
        Token ids of running text, the haystack.
    """

    encode: Encode
    ordinary: Sequence[int]
    begin: Tokens
    filler: np.ndarray[tuple[int, ...], np.dtype[np.int64]]

    def text(self, rng: np.random.Generator, length: int) -> Tokens:
        """``length`` consecutive tokens of the filler, from a random place."""
        start = rng.integers(0, max(1, len(self.filler) - length))
        found: Tokens = np.resize(self.filler[start : start + length], length).tolist() if length > 0 else []
        return found

    def random(self, rng: np.random.Generator, length: int) -> Tokens:
        found: Tokens = rng.choice(self.ordinary, length).tolist()
        return found


def repeated(source: Source, rng: np.random.Generator, length: int, segment: int) -> Example:
    """Random tokens, repeated until the sequence is full; scored from the second repeated token on."""
    size = length - len(source.begin)
    tokens = [*source.begin, *np.resize(source.random(rng, segment), size).tolist()]
    return Example(tokens, ((len(source.begin) + segment + 1, length),))


def copied(source: Source, rng: np.random.Generator, length: int, segment: int) -> Example:
    """Random tokens, running text, and the same tokens again; scored from the second one on."""
    part = source.random(rng, segment)
    gap = source.text(rng, length - len(source.begin) - 2 * segment)
    return Example([*source.begin, *part, *gap, *part], ((length - segment + 1, length),), length - segment)


def passkey(source: Source, rng: np.random.Generator, length: int, depth: float) -> Example:
    """A number of five digits told at a relative depth of running text and asked for at its end."""
    key = source.encode(str(rng.integers(10000, 100000)))
    needle = [*source.encode(NEEDLE[0]), *key, *source.encode(NEEDLE[1])]
    question = source.encode(QUESTION)
    free = length - len(source.begin) - len(needle) - len(question) - len(key)
    before = round(depth * free)
    hay = source.text(rng, free)
    tokens = [*source.begin, *hay[:before], *needle, *hay[before:], *question, *key]
    return Example(tokens, ((length - len(key), length),), length - len(question) - len(key))


def key_values(source: Source, rng: np.random.Generator, length: int, queries: int) -> Example:
    """Lines that give names a number, as many as fit, then some of the names again, for their numbers."""
    opening, equals = source.encode(PAIR[0]), source.encode(PAIR[1])
    names = iter(rng.permutation(np.arange(1000, 10000)).tolist())
    lines: list[tuple[Tokens, Tokens]] = []
    room = length - len(source.begin)

    def size(told: list[tuple[Tokens, Tokens]]) -> int:
        """Tokens of the lines and of the longest ``queries`` of them."""
        sizes = sorted((len(name) + len(number) for name, number in told), reverse=True)
        return sum(sizes) + sum(sizes[:queries])

    for name in names:
        number = source.encode(str(rng.integers(10000, 100000)))
        lines.append(([*opening, *source.encode(str(name)), *equals], number))
        if size(lines) > room:
            lines.pop()
            break
    asked = [lines[int(index)] for index in rng.permutation(len(lines))[:queries]]
    told = [token for name, number in lines for token in (*name, *number)]
    questions = sum(len(name) + len(number) for name, number in asked)
    tokens = [*source.begin, *source.text(rng, room - len(told) - questions), *told]
    prompt, answers = len(tokens), list[Span]()
    for name, number in asked:
        tokens += [*name, *number]
        answers.append((len(tokens) - len(number), len(tokens)))
    return Example(tokens, tuple(answers), prompt)
