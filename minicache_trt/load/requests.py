"""What is sent: prompts, and how many tokens are wanted after each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from minicache_trt.load.lengths import Lengths
from minicache_trt.load.text import TextMaker


@dataclass(frozen=True)
class Request:
    """A prompt and the number of tokens wanted after it (``max_tokens``)."""

    prompt: str
    output_len: int


class Source(Protocol):
    """Where requests come from."""

    @property
    def name(self) -> str:
        """In reports."""
        ...

    def draw(self, rng: np.random.Generator, count: int) -> list[Request]:
        """The next ``count`` requests; what was drawn before comes again only when there is nothing else."""
        ...


@dataclass(frozen=True)
class Synthetic:
    """Independent random texts.

    Parameters
    ----------
    name : str
        In reports.
    input_lens, output_lens : Lengths
        Of prompts and answers, drawn independently.
    text : TextMaker
    """

    name: str
    input_lens: Lengths
    output_lens: Lengths
    text: TextMaker

    def draw(self, rng: np.random.Generator, count: int) -> list[Request]:
        inputs, outputs = self.input_lens.draw(rng, count), self.output_lens.draw(rng, count)
        return [Request(self.text.make(rng, tokens), output) for tokens, output in zip(inputs, outputs, strict=True)]


class SharedPrefix:
    """Every prompt begins with one of a few texts, as behind a system prompt or over a document.

    Parameters
    ----------
    suffixes : Source
        What follows the prefix.
    prefix_len : int
        Tokens of each prefix.
    num_prefixes : int
        How many there are; requests take them in turn.
    text : TextMaker
    rng : numpy.random.Generator
        Draws the prefixes, once.
    """

    name = "shared-prefix"

    def __init__(
        self, suffixes: Source, prefix_len: int, num_prefixes: int, text: TextMaker, rng: np.random.Generator
    ) -> None:
        self._suffixes = suffixes
        self._prefixes = [text.make(rng, prefix_len) for _ in range(num_prefixes)]

    def draw(self, rng: np.random.Generator, count: int) -> list[Request]:
        return [
            replace(request, prompt=f"{self._prefixes[index % len(self._prefixes)]} {request.prompt}")
            for index, request in enumerate(self._suffixes.draw(rng, count))
        ]


class Recorded:
    """Given requests, in random order.

    Parameters
    ----------
    name : str
        In reports.
    requests : sequence of Request
        At least one.
    rng : numpy.random.Generator
        Shuffles them, once.
    """

    def __init__(self, name: str, requests: Sequence[Request], rng: np.random.Generator) -> None:
        self.name = name
        self._requests = [requests[index] for index in rng.permutation(len(requests))]
        self._next = 0

    def draw(self, rng: np.random.Generator, count: int) -> list[Request]:
        places = [(self._next + offset) % len(self._requests) for offset in range(count)]
        self._next += count
        return [self._requests[place] for place in places]
