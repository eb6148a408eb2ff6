"""An engine against PyTorch: is it computed right, and what does its compression cost?

Both questions are asked with teacher forcing on the engine's own greedy continuation, so that one early difference does
not make everything after it incomparable:

* *reference*: Hugging Face's model with the same plan and the same (dequantized) weights, by code that shares nothing
  with the engine's. What differs is rounding.
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

from minicache_trt.checkpoint.families import FAMILIES
from minicache_trt.checkpoint.quantize import dequantized_linears
from minicache_trt.checkpoint.resolve import load_checkpoint
from minicache_trt.engine_directory import CHECKPOINT, QUANTIZED, EngineInfo
from minicache_trt.reference import Reference
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
    """One prompt: its greedy continuation by the engine, and both agreements."""

    prompt_tokens: int
    generated_tokens: int
    reference: Agreement
    uncompressed: Agreement


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

    def to_dict(self) -> dict[str, Any]:
        return {
            "reference": self.summary("reference"),
            "uncompressed": self.summary("uncompressed"),
            "prompts": [asdict(prompt) for prompt in self.prompts],
        }


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
    """
    outputs = llm.generate(list(prompts), SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True))
    sequences = [[*o.prompt_token_ids, *o.outputs[0].token_ids] for o in outputs]
    lengths = [len(o.prompt_token_ids) for o in outputs]
    scores = llm.score(sequences, lengths, start=[length - 1 for length in lengths])
    reference = reference_for(directory, info)
    original = Reference(directory / CHECKPOINT, info.plan) if (directory / QUANTIZED).exists() else reference
    rows = []
    for done, (tokens, length, score) in enumerate(zip(sequences, lengths, scores, strict=True)):
        progress(done, len(sequences))
        # The last token's logits predict past the continuation.
        mine, start = score[:-1], length - 1
        same_plan = reference.logits(tokens, length, start).numpy()[:-1]
        uncompressed = original.uncompressed_logits(tokens, start).numpy()[:-1]
        rows.append(
            PromptComparison(length, len(tokens) - length, agreement(mine, same_plan), agreement(mine, uncompressed))
        )
    progress(len(sequences), len(sequences))
    return Comparison(tuple(rows))


def reference_for(directory: Path, info: EngineInfo) -> Reference:
    """Hugging Face's model with an engine's plan and its weights as the engine sees them."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory / CHECKPOINT, dtype=torch.float32)
    if (directory / QUANTIZED).exists():
        checkpoint = load_checkpoint(str(directory / CHECKPOINT))
        names = FAMILIES[info.model.family]
        if info.model.tie_word_embeddings:
            # The engine quantizes the output layer but not the embedding it shares its weight with.
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone(), requires_grad=False)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for name, weight in dequantized_linears(directory / QUANTIZED, checkpoint.weights).items():
            parameters[names.hf_name(f"{name}.weight")].data.copy_(torch.from_numpy(weight))
    return Reference(model, info.plan, info.build.window, info.build.quantum)
