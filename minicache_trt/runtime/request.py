"""What comes back to a caller, and the scheduler's state of one sequence."""

from __future__ import annotations

from dataclasses import dataclass, field

from minicache_trt.runtime.sampling_params import SamplingParams, expect

__all__ = ["CompletionOutput", "Logprob", "RequestOptions", "RequestOutput", "SamplingParams", "Sequence"]


@dataclass(frozen=True)
class Logprob:
    """Natural log of a token's probability under the raw logits, and its rank among all tokens (1 is the best)."""

    logprob: float
    rank: int


@dataclass(frozen=True)
class CompletionOutput:
    """Generated tokens of one request.

    Parameters
    ----------
    token_ids : list of int
        All sampled tokens, a final stop token included.
    cumulative_logprob : float, optional
        Sum over ``token_ids``; None unless logprobs were asked for.
    logprobs : list of dict, optional
        For each token: token id to `Logprob`.
    finish_reason : str, optional
        ``stop``, ``length``, ``error``, ``abort`` (by its caller), ``timeout``, or None while running.
    stop_reason : int or str, optional
        The stop token or string; the message for ``error``; None for the end-of-sequence token.
    text_diff, token_ids_diff : str, list of int
        What a stream's previous output did not have yet; empty elsewhere.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    text_diff: str = ""
    token_ids_diff: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class RequestOutput:
    """A request with its completions (one).

    ``prompt`` is None when token ids were given; ``num_cached_tokens`` of the prompt were found in the cache.
    ``prompt_logprobs``: for each token of the prompt, token id to `Logprob`; None for the first one, which nothing
    predicts, and None altogether unless they were asked for.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    num_cached_tokens: int = 0
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None


@dataclass(frozen=True)
class RequestOptions:
    """How a request is served; its greedy output does not depend on any of this.

    Parameters
    ----------
    priority : int
        Smaller is earlier, as in vLLM. The order stays fair: see `minicache_trt.runtime.scheduler.PRIORITY_STEP`.
    cache_salt : str, optional
        Only requests with the same salt share cached prefixes, so that one tenant cannot time another's prompts.
    deadline : float, optional
        Time of the scheduler's clock (`time.monotonic` unless told otherwise) at which the request ends unfinished.
    reuse : bool
        Whether to look for cached prefixes, and to leave one behind.
    """

    priority: int = 0
    cache_salt: str | None = None
    deadline: float | None = None
    reuse: bool = True

    def __post_init__(self) -> None:
        is_int = isinstance(self.priority, int) and not isinstance(self.priority, bool)
        expect(is_int, "priority", "a whole number", self.priority)
        salted = self.cache_salt is None or (isinstance(self.cache_salt, str) and self.cache_salt != "")
        expect(salted, "cache_salt", "text that is not empty", self.cache_salt)


DEFAULT_OPTIONS = RequestOptions()


@dataclass(eq=False)
class Sequence:
    """Scheduler and cache state of one sequence; compared and hashed by identity.

    Positions [0, compressed_len) are in the compressed tier, [compressed_len, num_computed) in the full tier; see
    `minicache_trt.contract`. Tokens from ``num_computed`` on are still to be computed. Preemption empties the tables
    and sets both counts to 0; the tokens stay.

    Parameters
    ----------
    token_ids : list of int
        Prompt, then output.
    prompt_len : int
        Tokens of the prompt; decides the demotion schedule.
    max_len : int
        Tokens this sequence can grow to.
    logits_start : int, optional
        Logits are wanted for every position from here on. Default: only for the last known token.
    options : RequestOptions
        Its place among others.

    Attributes
    ----------
    rank : tuple of int
        The scheduler's order, the first is the smallest; set when it is submitted.
    num_cached_tokens : int, optional
        Tokens found in the cache when it was first admitted; None before.
    first_step : float, optional
        Time of `time.perf_counter` when its first step began; None before.
    block_hashes : list of bytes
        See `minicache_trt.runtime.prefix_cache`; of the first complete blocks, as many as were needed so far.
    """

    token_ids: list[int]
    prompt_len: int
    max_len: int
    logits_start: int | None = None
    options: RequestOptions = DEFAULT_OPTIONS
    full_table: list[int] = field(default_factory=list)
    compressed_table: list[int] = field(default_factory=list)
    num_computed: int = 0
    compressed_len: int = 0
    rank: tuple[int, int] = (0, 0)
    num_cached_tokens: int | None = None
    first_step: float | None = None
    block_hashes: list[bytes] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_remaining(self) -> int:
        """Known tokens not computed yet."""
        return len(self.token_ids) - self.num_computed

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.prompt_len :]

    def logit_positions(self, start: int, end: int) -> range:
        """Positions of the chunk [start, end) whose logits are wanted."""
        if self.logits_start is not None:
            return range(max(start, min(self.logits_start, end)), end)
        return range(end - 1 if end == self.num_tokens else end, end)
