"""From a description of the requests to the requests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minicache_trt.load.dataset_file import read_requests
from minicache_trt.load.lengths import LogNormal, Uniform
from minicache_trt.load.requests import Recorded, SharedPrefix, Source, Synthetic
from minicache_trt.load.text import TextMaker

DATASETS = ("sharegpt-like", "random", "shared-prefix")
DEFAULT_OUTPUT_LEN = 200


@dataclass(frozen=True)
class SourceOptions:
    """What is sent.

    Parameters
    ----------
    dataset_name : str
        ``sharegpt-like`` (log-normal lengths of prompts and answers), ``random`` (fixed lengths, or uniform within
        ``range_ratio``) or ``shared-prefix`` (a prefix in common, then as ``random``).
    dataset_path : Path, optional
        A file instead, see `read_requests`.
    input_len, output_len : int
        Mean tokens of a prompt (without the shared prefix) and of an answer. The defaults, 220 and 200, are about the
        means of ShareGPT's first turns within 1,024 tokens. A file has its own lengths unless ``output_len`` is given.
    sigma : float
        Standard deviation of the natural logarithm of ``sharegpt-like`` lengths.
    range_ratio : float
        Share of the mean by which ``random`` lengths vary up and down.
    prefix_len, num_prefixes : int
        Tokens of each shared prefix, and how many there are.
    max_input_len, max_output_len : int
        Bounds of ``sharegpt-like`` and of a file.
    """

    dataset_name: str = "sharegpt-like"
    dataset_path: Path | None = None
    input_len: int = 220
    output_len: int | None = None
    sigma: float = 1.0
    range_ratio: float = 0.0
    prefix_len: int = 1000
    num_prefixes: int = 1
    max_input_len: int = 1024
    max_output_len: int = 1024

    def __post_init__(self) -> None:
        if self.dataset_name not in DATASETS:
            raise ValueError(f"dataset_name: expected one of {', '.join(DATASETS)}, got {self.dataset_name}")
        for name in ("input_len", "output_len", "prefix_len", "num_prefixes", "max_input_len", "max_output_len"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        Uniform(self.input_len, self.range_ratio)
        LogNormal(self.input_len, self.sigma, self.max_input_len)


def open_source(options: SourceOptions, text: TextMaker, seed: int) -> Source:
    """Requests as described.

    Raises
    ------
    UserError
        The file cannot be used.
    """
    rng = np.random.default_rng([seed])
    if options.dataset_path is not None:
        path = options.dataset_path
        requests = read_requests(path, text, options.output_len, options.max_input_len, options.max_output_len)
        return Recorded(path.name, requests, rng)
    output_len = options.output_len or DEFAULT_OUTPUT_LEN
    if options.dataset_name == "sharegpt-like":
        inputs = LogNormal(options.input_len, options.sigma, options.max_input_len)
        outputs = LogNormal(output_len, options.sigma, options.max_output_len)
        return Synthetic(options.dataset_name, inputs, outputs, text)
    ratio = options.range_ratio
    random = Synthetic("random", Uniform(options.input_len, ratio), Uniform(output_len, ratio), text)
    if options.dataset_name == "random":
        return random
    return SharedPrefix(random, options.prefix_len, options.num_prefixes, text, rng)
