"""The offline API: prompts in, text out."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from minicache_trt.backends.base import Engine
from minicache_trt.compression.methods import CALIBRATED_METHODS, DEFAULT_METHOD, make_plan
from minicache_trt.compression.plan import CompressionPlan
from minicache_trt.config import BuildConfig, KvCacheConfig, ModelConfig
from minicache_trt.errors import UserError
from minicache_trt.runtime.cache_sizes import CacheSizes
from minicache_trt.runtime.generation import Generation, Scoring, TokenEvent
from minicache_trt.runtime.prompts import PromptLike, check_tokens, parse_prompts
from minicache_trt.runtime.request import RequestOutput, SamplingParams
from minicache_trt.runtime.runner import Runner
from minicache_trt.runtime.statistics import Statistics
from minicache_trt.runtime.tiered_cache import Demotion
from minicache_trt.runtime.tokenizer import Tokenizer, load_tokenizer


class LLM:
    """A model ready to generate; call shapes of TensorRT-LLM's and vLLM's LLM API.

    Parameters
    ----------
    model : str or Path
        Engine directory; or a preset, hub id or checkpoint, which is built into a temporary engine first.
    tokenizer : Tokenizer or path, optional
        Default: the one in the engine directory. Without any, prompts must be token ids and the text stays empty.
    kv_cache_config : KvCacheConfig, optional
        Memory for the cache.
    method, plan : str, CompressionPlan
        How a model that is built here is compressed: a method's name, or a plan that replaces it.
    build_config : BuildConfig, optional
        Limits of an engine that is built here.
    load_format : str
        ``auto``, or ``dummy`` for the model's shape without its weights.
    num_threads : int, optional
        CPU threads of the backend.
    backend : str, optional
        A key of `minicache_trt.backends.BACKENDS`; default: the one the engine was built for.

    Raises
    ------
    UserError
        When the model cannot be loaded or the cache is too small for one sequence.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        tokenizer: Tokenizer | str | Path | None = None,
        kv_cache_config: KvCacheConfig | None = None,
        method: str = DEFAULT_METHOD,
        plan: CompressionPlan | None = None,
        build_config: BuildConfig | None = None,
        load_format: str = "auto",
        num_threads: int | None = None,
        backend: str | None = None,
    ) -> None:
        from minicache_trt.build import load_engine
        from minicache_trt.engine_directory import CHECKPOINT

        # Lives as long as this object; an engine that was built here vanishes with it.
        self._work_dir = tempfile.TemporaryDirectory(prefix="minicache-trt-")
        directory = _engine_directory(model, Path(self._work_dir.name), method, plan, build_config, load_format)
        engine = load_engine(directory, num_threads=num_threads, backend=backend)
        self._start(engine, directory / CHECKPOINT if tokenizer is None else tokenizer, kv_cache_config)

    @classmethod
    def from_engine(
        cls,
        engine: Engine,
        *,
        tokenizer: Tokenizer | str | Path | None = None,
        kv_cache_config: KvCacheConfig | None = None,
    ) -> LLM:
        """Run an engine that is already loaded; its pools are allocated here."""
        llm = cls.__new__(cls)
        llm._start(engine, tokenizer, kv_cache_config)
        return llm

    def _start(
        self, engine: Engine, tokenizer: Tokenizer | str | Path | None, kv_cache_config: KvCacheConfig | None
    ) -> None:
        self.engine = engine
        self._runner = Runner(engine, kv_cache_config or KvCacheConfig())
        self._tokenizer_source = tokenizer
        self._request_ids = itertools.count()

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Loaded on first use; None when there is none."""
        if isinstance(self._tokenizer_source, str | Path):
            self._tokenizer_source = load_tokenizer(Path(self._tokenizer_source))
        return self._tokenizer_source

    @property
    def statistics(self) -> Statistics:
        """Counts and times of the latest call."""
        return self._runner.statistics

    @property
    def cache_sizes(self) -> CacheSizes:
        """Blocks and bytes of both tiers."""
        return self._runner.sizes

    def generate(
        self,
        prompts: PromptLike | Sequence[PromptLike],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = False,
        on_token: Callable[[TokenEvent], None] | None = None,
    ) -> list[RequestOutput]:
        """Complete prompts, many at a time.

        Parameters
        ----------
        prompts : str, list of int, dict, or a list of these
            Text, token ids, or ``{"prompt_token_ids": [...]}``.
        sampling_params : SamplingParams or list of them, optional
            One for all, or one per prompt.
        use_tqdm : bool
            Show a progress bar of finished requests.
        on_token : callable, optional
            Called with a `TokenEvent` after each token of each request.

        Returns
        -------
        list of RequestOutput
            In the order of the prompts.

        Raises
        ------
        UserError
            When a prompt or parameter cannot be used; nothing has run then.
        """
        from tqdm.auto import tqdm  # type: ignore[import-untyped]

        generations = self._generations(prompts, sampling_params)
        pending = [generation for generation in generations if not generation.finished]
        bar = tqdm(total=len(pending), desc="requests", unit="request", disable=not use_tqdm)
        with closing(self._runner.run(pending)) as steps, bar:
            for advanced in steps:
                for generation in advanced:
                    if on_token is not None and generation.event is not None:
                        on_token(generation.event)
                bar.update(sum(generation.finished for generation in advanced))
        return [generation.output() for generation in generations]

    def generate_stream(self, prompt: PromptLike, sampling_params: SamplingParams | None = None) -> Iterator[str]:
        """Complete one prompt; yields its text piece by piece, each piece final.

        Raises
        ------
        UserError
            Before the first piece, when the prompt cannot be used; in the middle, when the model's logits cannot.
        """
        generations = self._generations(prompt, sampling_params)
        if len(generations) != 1:
            raise UserError(f"generate_stream: expected one prompt, got {len(generations)}", "use generate")
        return self._stream(generations[0])

    def score(
        self,
        token_ids: Sequence[list[int]],
        prompt_lens: Sequence[int] | None = None,
        start: int | Sequence[int] = 0,
        observe: Callable[[int, int, int], None] | None = None,
    ) -> list[NDArray[np.float32]]:
        """Logits of given tokens, exactly as generation would have seen them (teacher forcing).

        Prompts are prefilled and demoted as prompts are; the tokens after them are decoded one by one, all sequences
        together.

        Parameters
        ----------
        token_ids : list of list of int
            Prompts with their continuations.
        prompt_lens : list of int, optional
            Tokens of each prompt, 1 to all of them. Default: everything is prompt.
        start : int or list of int
            First position whose logits are returned, for all sequences or for each.
        observe : callable, optional
            Called for each block that was compressed with the index of its sequence, its number within the sequence
            and its id in the compressed tier, before the next step.

        Returns
        -------
        list of float32 ``[len(token_ids[i]) - start[i], vocab]``
            Row j predicts the token at position start[i] + j + 1.

        Raises
        ------
        UserError
            When tokens or lengths cannot be used; nothing has run then.
        """
        count = len(token_ids)
        lengths = [len(tokens) for tokens in token_ids] if prompt_lens is None else list(prompt_lens)
        starts = [start] * count if isinstance(start, int) else list(start)
        for name, values in (("prompt_lens", lengths), ("start", starts)):
            if len(values) != count:
                raise UserError(f"{name}: expected {count} numbers, one per sequence, got {len(values)}")
        model, build = self.engine.model, self.engine.build
        for index, (tokens, length, first) in enumerate(zip(token_ids, lengths, starts, strict=True)):
            check_tokens(tokens, f"token_ids[{index}]", model.vocab_size, build.max_seq_len)
            if not 1 <= length <= len(tokens):
                raise UserError(f"prompt_lens[{index}]: expected 1 to {len(tokens)}, got {length}")
            if first < 0:
                raise UserError(f"start: expected positions of at least 0, got {first}")
        jobs = [
            Scoring(tokens, length, first, model.vocab_size)
            for tokens, length, first in zip(token_ids, lengths, starts, strict=True)
        ]
        places = {job.sequence: index for index, job in enumerate(jobs)}

        def compressed(demotion: Demotion) -> None:
            if observe is not None:
                observe(places[demotion.sequence], demotion.block_index, demotion.target)

        for _ in self._runner.run(jobs, compressed):
            pass
        return [job.logits for job in jobs]

    def check_integrity(self) -> None:
        """Verify that every cache block is accounted for."""
        self._runner.check_integrity()

    def _generations(
        self,
        prompts: PromptLike | Sequence[PromptLike],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
    ) -> list[Generation]:
        model, build = self.engine.model, self.engine.build
        parsed = parse_prompts(prompts, self.tokenizer, model.vocab_size, build.max_seq_len)
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            params = [sampling_params or SamplingParams()] * len(parsed)
        else:
            params = list(sampling_params)
        if len(params) != len(parsed):
            raise UserError(f"sampling_params: expected 1 or {len(parsed)} (one per prompt), got {len(params)}")
        if self.tokenizer is None and any(item.stop_strings for item in params):
            raise UserError("stop: stop strings need a tokenizer", "use stop_token_ids, or pass tokenizer=")
        return [
            Generation(
                request_id=str(next(self._request_ids)),
                prompt=prompt.text,
                token_ids=prompt.token_ids,
                params=item,
                max_seq_len=build.max_seq_len,
                eos_token_ids=model.eos_token_ids,
                tokenizer=self.tokenizer,
            )
            for prompt, item in zip(parsed, params, strict=True)
        ]

    def _stream(self, generation: Generation) -> Iterator[str]:
        if generation.finished:
            return
        with closing(self._runner.run([generation])) as steps:
            for _ in steps:
                if generation.event is not None and generation.event.text:
                    yield generation.event.text
        if generation.finish_reason == "error":
            raise UserError(f"the request ended early: {generation.output().outputs[0].stop_reason}")


def _engine_directory(
    model: str | Path,
    work_dir: Path,
    method: str,
    plan: CompressionPlan | None,
    build_config: BuildConfig | None,
    load_format: str,
) -> Path:
    """``model`` itself when it is an engine directory, else a new engine below ``work_dir``."""
    from minicache_trt.build import build_engine, default_max_seq_len
    from minicache_trt.engine_directory import is_engine_directory

    if is_engine_directory(model):
        return Path(model)
    if plan is None and method in CALIBRATED_METHODS:
        raise UserError(
            f"method {method!r} needs text to calibrate on",
            f"give an engine that minicache-trt build --method {method} --calibration-text FILE wrote",
        )

    def configure(config: ModelConfig) -> tuple[CompressionPlan, BuildConfig]:
        build = build_config or BuildConfig(max_seq_len=default_max_seq_len(config))
        return plan or make_plan(config, method), build

    return build_engine(str(model), work_dir / "engine", configure, load_format=load_format).directory
