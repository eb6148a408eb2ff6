"""An engine against PyTorch: is it computed right, and what does its compression cost?

Both questions are asked with teacher forcing on the engine's own greedy continuation, so that one early difference does
not make everything after it incomparable:

* *reference*: Hugging Face's model with the same plan and the same (dequantized) weights, by code that shares nothing
  with the engine's. What differs is rounding. Where a code or a retained token falls on the other side of a decision
  boundary, the reference goes on with the engine's choice and the distance from the boundary is reported (`Ties`).
* *uncompressed*: Hugging Face's model as it is. What differs is the quality cost of plan and weight format.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from minicache_trt.backends.base import Engine
from minicache_trt.contract import plan_layout
from minicache_trt.engine_directory import QUANTIZED, EngineInfo
from minicache_trt.errors import UserError
from minicache_trt.hf_reference import load_model, reference_for
from minicache_trt.reference import EncodedBlocks, Reference
from minicache_trt.reference.history import Adopt
from minicache_trt.reference.ties import Stored, Ties, adopt
from minicache_trt.runtime.llm import LLM
from minicache_trt.runtime.request import SamplingParams

Logits = NDArray[np.float32]


@dataclass(frozen=True)
class Agreement:
    """How two sets of logits ``[N, vocab]`` for the same tokens agree.

    Parameters
    ----------
    max_abs_diff, mean_abs_diff : float
        Of the logits.
    kl : float
        Mean over positions of KL(other || engine), in nats.
    max_kl : float
    top1_agreement : float
        Share of positions with the same most likely token, in [0, 1].
    common_prefix : int
        Tokens until greedy decoding from the two would part; ``positions`` if it never does.
    part_gap : float or None
        Where they part: the gap between the other side's two best logits (small means a near tie).
    positions : int
    """

    max_abs_diff: float
    mean_abs_diff: float
    kl: float
    max_kl: float
    top1_agreement: float
    common_prefix: int
    part_gap: float | None
    positions: int


@dataclass(frozen=True)
class PromptComparison:
    """One prompt: its greedy continuation by the engine, both agreements, and how its compressed blocks compare."""

    prompt_tokens: int
    generated_tokens: int
    reference: Agreement
    uncompressed: Agreement
    ties: Ties


@dataclass(frozen=True)
class Comparison:
    """All prompts. ``summary`` pools them: extremes of extremes, means of means."""

    prompts: tuple[PromptComparison, ...]

    def summary(self, against: str) -> dict[str, float]:
        """Figures over all prompts for ``reference`` or ``uncompressed``."""
        rows = [getattr(prompt, against) for prompt in self.prompts]
        positions = sum(row.positions for row in rows)

        def mean(name: str) -> float:
            return sum(getattr(row, name) * row.positions for row in rows) / positions

        return {
            "max_abs_diff": max(row.max_abs_diff for row in rows),
            "mean_abs_diff": mean("mean_abs_diff"),
            "kl": mean("kl"),
            "max_kl": max(row.max_kl for row in rows),
            "top1_agreement": mean("top1_agreement"),
            "common_prefix": min(row.common_prefix for row in rows),
            "positions": positions,
        }

    def ties(self) -> Ties:
        """Differences in compressed blocks over all prompts."""
        total = Ties()
        for prompt in self.prompts:
            total.add(prompt.ties)
        return total

    def to_dict(self) -> dict[str, Any]:
        return {
            "reference": self.summary("reference"),
            "uncompressed": self.summary("uncompressed"),
            "ties": asdict(self.ties()),
            "prompts": [asdict(prompt) for prompt in self.prompts],
        }


class BlockRecorder:
    """Keeps what an engine stored of each block it compressed, by sequence; an observer for `LLM.score`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._layouts = plan_layout(engine.plan, engine.model)
        self.blocks: dict[tuple[int, int], list[Stored]] = {}

    def __call__(self, sequence: int, block: int, target: int) -> None:
        self.blocks[sequence, block] = [
            {kind: self._engine.pool(pool.name)[target].copy() for kind, pool in layout.pools.items()}
            for layout in self._layouts
        ]

    def adopter(self, sequence: int, ties: Ties) -> Adopt:
        """For `Reference.logits`: go on with the engine's blocks of one sequence, counting differences in ``ties``.

        A block that is behind the sliding window when its turn comes is never compressed by an engine, nor read again.
        """
        windowed = self._engine.model.cache_window is not None

        def adopted(stream: int, block: int, x: torch.Tensor, encoded: EncodedBlocks) -> EncodedBlocks:
            if windowed and (sequence, block) not in self.blocks:
                return encoded
            return adopt(self._layouts[stream], x, encoded, self.blocks[sequence, block][stream], ties)

        return adopted


def agreement(engine: Logits, other: Logits) -> Agreement:
    """Compare the engine's logits with another's, position by position."""
    mine, theirs = engine.astype(np.float64), other.astype(np.float64)
    difference = np.abs(mine - theirs)
    log_mine, log_theirs = _log_softmax(mine), _log_softmax(theirs)
    kl = (np.exp(log_theirs) * (log_theirs - log_mine)).sum(-1)
    same = mine.argmax(-1) == theirs.argmax(-1)
    part = len(same) if same.all() else int(np.argmin(same))
    gap = None
    if part < len(same):
        best = np.partition(theirs[part], -2)[-2:]
        gap = float(best[1] - best[0])
    return Agreement(
        max_abs_diff=float(difference.max()),
        mean_abs_diff=float(difference.mean()),
        kl=float(kl.mean()),
        max_kl=float(kl.max()),
        top1_agreement=float(same.mean()),
        common_prefix=part,
        part_gap=gap,
        positions=len(same),
    )


def _log_softmax(x: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = x - x.max(-1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def compare_engine(
    llm: LLM,
    directory: Path,
    info: EngineInfo,
    prompts: Sequence[str | list[int]],
    max_tokens: int,
    progress: Callable[[int, int], None],
) -> Comparison:
    """Compare an engine with PyTorch on prompts and its own greedy continuations.

    Parameters
    ----------
    llm : LLM
        The engine, running.
    directory : Path
        Its directory, which holds the checkpoint the reference loads.
    info : EngineInfo
    prompts : sequence of str or list of int
    max_tokens : int
        Tokens to generate for each prompt; logits are compared at these positions.
    progress : callable
        Called with prompts done and prompts in all.

    Raises
    ------
    UserError
        A prompt cannot be used, or the engine cannot continue it.
    """
    sequences, lengths = greedy_continuations(llm, prompts, max_tokens)
    recorder = BlockRecorder(llm.engine)
    scores = llm.score(sequences, lengths, start=[length - 1 for length in lengths], observe=recorder)
    reference = reference_for(directory, info)
    original = Reference(load_model(directory, info, {}), info.plan) if (directory / QUANTIZED).exists() else reference
    rows = []
    for done, (tokens, length, score) in enumerate(zip(sequences, lengths, scores, strict=True)):
        progress(done, len(sequences))
        # The last token's logits predict past the continuation.
        mine, start = score[:-1], length - 1
        ties = Ties()
        same_plan = reference.logits(tokens, length, start, recorder.adopter(done, ties)).numpy()[:-1]
        uncompressed = original.uncompressed_logits(tokens, start).numpy()[:-1]
        rows.append(
            PromptComparison(
                length, len(tokens) - length, agreement(mine, same_plan), agreement(mine, uncompressed), ties
            )
        )
    progress(len(sequences), len(sequences))
    return Comparison(tuple(rows))


def greedy_continuations(
    llm: LLM, prompts: Sequence[str | list[int]], max_tokens: int
) -> tuple[list[list[int]], list[int]]:
    """Token ids of each prompt with the engine's greedy continuation, and the lengths of the prompts alone.

    Raises
    ------
    UserError
        A prompt cannot be used, or the engine cannot continue it.
    """
    outputs = llm.generate(list(prompts), SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True))
    for index, output in enumerate(outputs):
        completion = output.outputs[0]
        if completion.finish_reason == "error":
            raise UserError(f"prompts[{index}]: the engine ended early: {completion.stop_reason}")
        if not completion.token_ids:
            raise UserError(
                f"prompts[{index}] has {len(output.prompt_token_ids)} tokens and fills the engine's max_seq_len "
                f"{llm.engine.build.max_seq_len}, so there is nothing to compare",
                "shorten the prompt, or build the engine with a larger max_seq_len",
            )
    sequences = [[*o.prompt_token_ids, *o.outputs[0].token_ids] for o in outputs]
    return sequences, [len(o.prompt_token_ids) for o in outputs]
