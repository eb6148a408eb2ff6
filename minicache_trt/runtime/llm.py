"""The Python API: prompts in, text out."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from minicache_trt.backends.base import DistributedEngine, Engine
from minicache_trt.compression.methods import DEFAULT_METHOD
from minicache_trt.compression.plan import CompressionPlan
from minicache_trt.config import BuildConfig, KvCacheConfig
from minicache_trt.errors import UserError
from minicache_trt.quantization.store import WeightOptions
from minicache_trt.runtime.async_request import AsyncRequest
from minicache_trt.runtime.cache_sizes import CacheSizes
from minicache_trt.runtime.engine_loop import EngineLoop
from minicache_trt.runtime.generation import Generation, TokenEvent
from minicache_trt.runtime.job import Job, Update
from minicache_trt.runtime.load import Load
from minicache_trt.runtime.observer import RequestObserver
from minicache_trt.runtime.prompts import PromptLike
from minicache_trt.runtime.request import RequestOutput, SamplingParams
from minicache_trt.runtime.request_factory import RequestFactory, request_options
from minicache_trt.runtime.runner import Runner
from minicache_trt.runtime.scoring import likelihood_jobs, logit_jobs
from minicache_trt.runtime.statistics import Statistics
from minicache_trt.runtime.temporary_engine import engine_directory
from minicache_trt.runtime.tokenizer import Tokenizer
from minicache_trt.runtime.wakeups import Wakeups


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
    weight_options : WeightOptions, optional
        How weights of an engine that is built here are computed: calibration text, threads.
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
        weight_options: WeightOptions | None = None,
        load_format: str = "auto",
        num_threads: int | None = None,
        backend: str | None = None,
    ) -> None:
        from minicache_trt.build import load_engine
        from minicache_trt.engine_directory import CHECKPOINT

        # Lives as long as this object; an engine that was built here vanishes with it.
        self._work_dir = tempfile.TemporaryDirectory(prefix="minicache-trt-")
        work_dir = Path(self._work_dir.name)
        directory = engine_directory(model, work_dir, method, plan, build_config, load_format, weight_options)
        self.directory: Path | None = directory
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
        llm.directory = None
        llm._start(engine, tokenizer, kv_cache_config)
        return llm

    def _start(
        self, engine: Engine, tokenizer: Tokenizer | str | Path | None, kv_cache_config: KvCacheConfig | None
    ) -> None:
        self.engine = engine
        self._runner = Runner(engine, kv_cache_config or KvCacheConfig())
        self._requests = RequestFactory(engine.model, engine.build, tokenizer)
        self._loop: EngineLoop | None = None
        self._loop_lock = threading.Lock()
        self._wakeups = Wakeups()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Loaded on first use; None when there is none."""
        return self._requests.tokenizer

    @property
    def statistics(self) -> Statistics:
        """Counts and times of the latest call; once `generate_async` was used, of everything since."""
        return self._runner.statistics

    @property
    def load(self) -> Load:
        """Requests and blocks in use now; any thread may ask."""
        return Load.of(self._runner)

    @property
    def cache_sizes(self) -> CacheSizes:
        """Blocks and bytes of both tiers."""
        return self._runner.sizes

    @property
    def failure(self) -> str | None:
        """Why the engine has ended by itself and takes nothing any more, or None; any thread may ask."""
        ended = None if self._loop is None else self._loop.failure
        return ended or (self.engine.failure if isinstance(self.engine, DistributedEngine) else None)

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

        generations = self._requests.many(prompts, sampling_params)
        pending = [generation for generation in generations if not generation.finished]
        bar = tqdm(total=len(pending), desc="requests", unit="request", disable=not use_tqdm)
        with closing(self._run(pending)) as steps, bar:
            for updates in steps:
                for update in updates:
                    if on_token is not None and update.event is not None:
                        on_token(update.event)
                bar.update(sum(update.finished for update in updates))
        return [generation.output() for generation in generations]

    def generate_async(
        self,
        prompt: PromptLike,
        sampling_params: SamplingParams | None = None,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
        timeout: float | None = None,
        observer: RequestObserver | None = None,
    ) -> AsyncRequest:
        """Start completing one prompt and return at once; an engine thread runs as long as there are requests.

        From the first call on, `generate`, `generate_stream` and `score` share that thread's batches too.

        Parameters
        ----------
        prompt, sampling_params
            As for `generate`.
        priority : int
            Smaller is earlier, see `RequestOptions`.
        cache_salt : str, optional
            Only requests with the same salt share cached prefixes.
        timeout : float, optional
            Seconds from now after which the request ends with ``finish_reason`` ``timeout`` and what it has.
        observer : RequestObserver, optional
            Told what happens, in the engine thread.

        Returns
        -------
        AsyncRequest
            Await it for the result, or iterate over it for what has been generated so far.

        Raises
        ------
        UserError
            When the request cannot be used, the LLM has been shut down, or another thread is in `generate`.
        """
        options = request_options(priority, cache_salt, timeout)
        generation = self._requests.one(prompt, sampling_params, options, observer)
        with self._loop_lock:
            self._loop = self._loop or EngineLoop(self._runner, self._wakeups.flush)
        request = AsyncRequest(generation, self._loop.cancel, self._wakeups)
        if generation.finished:
            generation.end("length")
            request.update(Update.of(generation))
        else:
            self._loop.submit(generation, request.update)
        return request

    def shutdown(self, *, drain: bool = True, timeout: float | None = None) -> bool:
        """Take no more asynchronous requests and wait for those there are; also the end of a ``with`` block.

        Parameters
        ----------
        drain : bool
            Let requests run to their end; otherwise they end now, with ``finish_reason`` ``abort``.
        timeout : float, optional
            Seconds to wait; requests that need longer are aborted then, and the result is False.
        """
        return self._loop is None or self._loop.shutdown(drain, timeout)

    def generate_stream(self, prompt: PromptLike, sampling_params: SamplingParams | None = None) -> Iterator[str]:
        """Complete one prompt; yields its text piece by piece, each piece final.

        Raises
        ------
        UserError
            Before the first piece, when the prompt cannot be used; in the middle, when the model's logits cannot.
        """
        return self._stream(self._requests.one(prompt, sampling_params))

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
        jobs = logit_jobs(token_ids, prompt_lens, start, observe, self.engine.model, self.engine.build)
        list(self._run(jobs))
        return [job.result() for job in jobs]

    def likelihoods(
        self,
        token_ids: Sequence[list[int]],
        prompt_lens: Sequence[int] | None = None,
        start: int | Sequence[int] = 0,
        progress: Callable[[int], None] | None = None,
    ) -> list[tuple[NDArray[np.float64], NDArray[np.bool_]]]:
        """How likely each token is after those before it, reading the history that generation would have read.

        The numbers are those of `score`, up to rounding, at a fraction of the time and memory: tokens after the prompt
        that read the same compressed history are computed in one step, a block of them, and logits are not kept.

        Parameters
        ----------
        token_ids : list of list of int
            The last token of each is only predicted, so there may be one more than the engine's ``max_seq_len``.
        prompt_lens, start
            As for `score`.
        progress : callable, optional
            Called after each step with the number of tokens computed so far.

        Returns
        -------
        list of pairs
            ``nll [len(token_ids[i]) - start[i] - 1]`` float64, in nats, and whether the token was the most likely one,
            bool; entry j is of token start[i] + j + 1.

        Raises
        ------
        UserError
            When tokens or lengths cannot be used; nothing has run then.
        """
        jobs = likelihood_jobs(token_ids, prompt_lens, start, self.engine.model, self.engine.build)
        for _ in self._run(jobs):
            if progress is not None:
                progress(sum(job.num_computed for job in jobs))
        return [job.result() for job in jobs]

    def check_integrity(self) -> None:
        """Verify that every cache block is accounted for."""
        self._runner.check_integrity()

    def _run(self, jobs: Sequence[Job]) -> Generator[list[Update], None, None]:
        return self._runner.run(jobs) if self._loop is None else self._loop.run(jobs)

    def _stream(self, generation: Generation) -> Iterator[str]:
        with closing(self._run([] if generation.finished else [generation])) as steps:
            for updates in steps:
                yield from (update.event.text for update in updates if update.event and update.event.text)
        if generation.finish_reason == "error":
            raise UserError(f"the request ended early: {generation.output().outputs[0].stop_reason}")
