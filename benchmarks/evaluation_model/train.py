"""Train a Llama on Python sources and recall tasks: a model that truly uses its context, to evaluate caches with.

Text is the standard library and the installed packages of the running interpreter; a share of the rows are examples of
`minicache_trt.evaluation.examples` (other ones than are ever scored: other seeds, and filler that is trained on). Rows
are short first and long at the end. An interrupted run resumes from ``--state``; the checkpoint in ``--output`` is
written every few minutes, and can be used while training goes on.

    python benchmarks/evaluation_model/train.py --init-from CHECKPOINT --minutes 80 --output model     # one CPU core
    python benchmarks/evaluation_model/train.py --device cuda --layers 16 --hidden 512 --intermediate 1408 --heads 8 \\
        --kv-heads 2 --vocab 8192 --batch-tokens 65536 --minutes 60 --output model
"""

from __future__ import annotations

import copy
import importlib.util
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import typer
from corpus import load_corpus
from transformers import AttentionInterface, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from minicache_trt.evaluation import examples
from minicache_trt.evaluation.examples import Example, Source

REPOSITORY = Path(__file__).resolve().parents[2]
SEPARATOR = "\n\0"
LENGTHS = (512, 1024, 2048, 4096)
EARLY, LATE, LATE_FROM = (0.6, 0.4, 0.0, 0.0), (0.25, 0.25, 0.25, 0.25), 0.72
"""Shares of row lengths, and the part of training from which the later ones count."""
TASKS = {"repeated": 0.09, "copied": 0.07, "passkey": 0.07, "key_values": 0.17}
"""Shares of rows; the rest is text, half of it from the standard library."""
ANSWER_WEIGHT = {"passkey": 8.0, "key_values": 4.0}
"""What an answer counts beside a token of text: answers are a few tokens of a long row."""


def demo_training() -> ModuleType:
    """The demo model's training script: its tokenizer, optimizer and attention."""
    spec = importlib.util.spec_from_file_location("demo_train", REPOSITORY / "examples" / "demo_model" / "train.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["demo_train"] = module
    spec.loader.exec_module(module)
    return module


class Row(NamedTuple):
    """Tokens ``[length + 1]`` and what predicting each but the first counts, ``[length]``."""

    tokens: np.ndarray[Any, np.dtype[np.int64]]
    weights: np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True)
class Data:
    """Token streams of text and what examples are made of."""

    streams: tuple[np.ndarray[Any, np.dtype[np.int64]], ...]
    source: Source

    def row(self, rng: np.random.Generator, length: int) -> Row:
        """One row; only answers count where everything else is random and cannot be predicted."""
        kind = str(rng.choice([*TASKS, "text"], p=[*TASKS.values(), 1 - sum(TASKS.values())]))
        if kind == "text":
            stream = self.streams[int(rng.integers(len(self.streams)))]
            start = rng.integers(0, len(stream) - length)
            tokens = [*self.source.begin, *stream[start : start + length + 1].tolist()]
            return Row(np.array(tokens[: length + 1]), np.ones(length, np.float32))
        example = self.example(kind, rng, length + 1)
        weights = np.full(length + 1, 1.0 if kind == "passkey" else 0.0, np.float32)
        for first, stop in example.answers:
            weights[first:stop] = ANSWER_WEIGHT.get(kind, 1.0)
        return Row(np.array(example.tokens), weights[1:])

    def example(self, kind: str, rng: np.random.Generator, length: int) -> Example:
        longest = length // 2 - 16 if rng.random() < 0.3 else 300
        segment = int(np.exp(rng.uniform(np.log(4), np.log(min(longest, length // 2 - 16)))))
        if kind == "repeated":
            return examples.repeated(self.source, rng, length, segment)
        if kind == "copied":
            return examples.copied(self.source, rng, length, max(8, segment))
        if kind == "passkey":
            return examples.passkey(self.source, rng, length, rng.random())
        size = length if rng.random() < 0.5 else int(rng.integers(length // 4, length + 1))
        told = examples.key_values(self.source, rng, size, int(rng.integers(4, 8 + size // 48)))
        ahead = self.source.text(rng, length - size)  # few pairs far from where they are asked for
        moved = tuple((a + len(ahead), b + len(ahead)) for a, b in told.answers)
        begin = len(self.source.begin)
        return Example([*told.tokens[:begin], *ahead, *told.tokens[begin:]], moved)

    def batch(self, seed: int, step: int, progress: float, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens of a step, ``[rows, length + 1]``, and weights, ``[rows, length]``."""
        rng = np.random.default_rng((seed, step))
        length = int(rng.choice(LENGTHS, p=LATE if progress > LATE_FROM else EARLY))
        rows = [self.row(rng, length) for _ in range(max(1, tokens // length))]
        return torch.from_numpy(np.stack([row.tokens for row in rows])), torch.from_numpy(
            np.stack([row.weights for row in rows])
        )


def load_data(tokenizer: Any, texts: list[list[str]], vocab_size: int) -> Data:
    """Tokenize; documents are closed by the end token."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    streams = []
    for part in texts:
        ids = tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
        streams.append(np.concatenate([np.array([*row, *end], np.int64) for row in ids]))
    ordinary = np.setdiff1d(np.arange(min(vocab_size, len(tokenizer))), tokenizer.all_special_ids)
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
        return ids

    return Data(tuple(streams), Source(encode, ordinary.tolist(), begin, streams[0]))


class Trainer:
    """fp32 master weights, computation in ``dtype``, Muon for matrices and AdamW for the rest."""

    def __init__(
        self, model: LlamaForCausalLM, demo: ModuleType, device: str, dtype: torch.dtype, lr: float, muon_lr: float
    ) -> None:
        self.model, self.peaks = model.to(device), (lr, muon_lr)
        self.master = [p.detach().float().clone().requires_grad_() for p in model.parameters()]
        for p in model.parameters():
            p.data = p.data.to(dtype)
        embedding = model.get_input_embeddings().weight
        matrix = [p.dim() == 2 and p is not embedding for p in model.parameters()]
        others = [m for m, is_matrix in zip(self.master, matrix, strict=True) if not is_matrix]
        hidden = [m for m, is_matrix in zip(self.master, matrix, strict=True) if is_matrix]
        self.optimizers = (
            torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
            demo.Muon(hidden, lr=muon_lr, dtype=dtype),
        )

    def step(self, tokens: torch.Tensor, weights: torch.Tensor, rate: float) -> float:
        """One update; returns the loss."""
        hidden = self.model.model(input_ids=tokens[:, :-1]).last_hidden_state
        logits = self.model.lm_head(hidden).flatten(0, 1).float()
        losses = F.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="none")
        loss = (losses * weights.flatten()).sum() / weights.sum()
        loss.backward()
        for p, m in zip(self.model.parameters(), self.master, strict=True):
            m.grad, p.grad = p.grad.float(), None
        torch.nn.utils.clip_grad_norm_(self.master, 1.0)
        for optimizer, peak in zip(self.optimizers, self.peaks, strict=True):
            optimizer.param_groups[0]["lr"] = rate * peak
            optimizer.step()
        self.publish()
        return loss.item()

    @torch.no_grad()
    def publish(self) -> None:
        """Copy the master weights into the model."""
        for p, m in zip(self.model.parameters(), self.master, strict=True):
            p.copy_(m)

    def save(self, path: Path, **numbers: float) -> None:
        state = {"master": self.master, "optimizers": [o.state_dict() for o in self.optimizers], **numbers}
        torch.save(state, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)

    def load(self, path: Path) -> dict[str, Any]:
        state: dict[str, Any] = torch.load(path, map_location=self.master[0].device)
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        with torch.no_grad():
            for m, saved in zip(self.master, state["master"], strict=True):
                m.copy_(saved)
        self.publish()
        return state


def main(
    output: Annotated[Path, typer.Option(help="Checkpoint folder.")],
    state: Annotated[Path | None, typer.Option(help="File to resume from; default OUTPUT.state.")] = None,
    init_from: Annotated[Path | None, typer.Option(help="Checkpoint to go on from, with its tokenizer.")] = None,
    held_out: Annotated[Path | None, typer.Option(help="Documents (newline and NUL between) to leave out.")] = None,
    held_text: Annotated[Path | None, typer.Option(help="Write the held-out sources here.")] = None,
    minutes: Annotated[float, typer.Option(help="Time of the training loop.")] = 80.0,
    layers: int = 16, hidden: int = 256, intermediate: int = 512, heads: int = 4, kv_heads: int = 2,
    head_dim: int = 64, vocab: int = 4096, rope_theta: float = 10000.0, context: int = 4096,
    batch_tokens: int = 8192,
    megabytes: Annotated[float, typer.Option(help="Source text of installed packages.")] = 40.0,
    lr: Annotated[float, typer.Option(help="Peak rate of AdamW: embedding, norms.")] = 2e-3,
    muon_lr: Annotated[float, typer.Option(help="Peak rate of Muon: weight matrices.")] = 0.015,
    device: str = "cpu",
    threads: int = 1,
    seed: int = 0,
    save_minutes: float = 4.0,
    compile: bool = True,
) -> None:  # fmt: skip
    """Train or resume, and export a checkpoint."""
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    torch.manual_seed(seed)
    demo = demo_training()
    excluded = held_out.read_text(encoding="utf-8").split(SEPARATOR) if held_out else []
    corpus = load_corpus(excluded, megabytes)
    if held_text:
        held_text.write_text(SEPARATOR.join(corpus.held), encoding="utf-8")
    if init_from:
        tokenizer = AutoTokenizer.from_pretrained(init_from)
        model = LlamaForCausalLM.from_pretrained(init_from, dtype=torch.float32)
        model.config.max_position_embeddings = context
    else:
        tokenizer = demo.train_tokenizer(corpus.stdlib + corpus.packages, vocab, context)
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=vocab, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim, rms_norm_eps=1e-6,
            max_position_embeddings=context, rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
            tie_word_embeddings=True, bos_token_id=demo.BOS, eos_token_id=demo.EOS, pad_token_id=None,
        ))  # fmt: skip
    data = load_data(tokenizer, [corpus.stdlib, corpus.packages], model.config.vocab_size)
    counts = [len(stream) for stream in data.streams]
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters; tokens of text: {counts}", flush=True)
    AttentionInterface.register("block_causal", demo.block_attention)
    model.set_attn_implementation("block_causal" if device == "cpu" else "sdpa")
    config = copy.deepcopy(model.config)
    model.config.use_cache = False
    trainer = Trainer(model, demo, device, demo.fastest_dtype(device), lr, muon_lr)
    if compile:
        for layer in model.model.layers:
            layer.compile(dynamic=False)
    train(trainer, data, minutes, batch_tokens, seed, save_minutes, state or output.with_suffix(".state"),
          lambda: demo.write_checkpoint(LlamaForCausalLM(config), trainer.master, tokenizer, output))  # fmt: skip


def train(
    trainer: Trainer, data: Data, minutes: float, batch_tokens: int, seed: int, save_minutes: float, state_path: Path,
    export: Callable[[], None],
) -> None:  # fmt: skip
    """The loop; the rate falls linearly over ``minutes``."""
    step, spent, seen = 0, 0.0, 0
    if state_path.exists():
        state = trainer.load(state_path)
        step, spent, seen = state["step"], state["spent"], state["seen"]
    start = time.monotonic() - spent
    last = saved = time.monotonic()
    losses: list[float] = []
    fresh = 0
    while (progress := (time.monotonic() - start) / 60 / minutes) < 1:
        rate = min(1.0, (step + 1) / 40) * max(0.02, min(1.0, 1.15 * (1 - progress)))
        tokens, weights = data.batch(seed, step, progress, batch_tokens)
        losses.append(trainer.step(tokens.to(trainer.master[0].device), weights.to(trainer.master[0].device), rate))
        step, seen, fresh = step + 1, seen + weights.numel(), fresh + weights.numel()
        now = time.monotonic()
        if not math.isfinite(losses[-1]):
            raise SystemExit(f"loss is {losses[-1]} at step {step}")
        if step % 10 == 0:
            print(f"step {step} loss {np.mean(losses):.3f} rate {rate:.3f} {fresh / (now - last):.0f} tokens/s "
                  f"{seen / 1e6:.2f} M tokens {(now - start) / 60:.1f} min", flush=True)  # fmt: skip
            losses, fresh, last = [], 0, now
        if now - saved > 60 * save_minutes:
            trainer.save(state_path, step=step, spent=now - start, seen=seen)
            export()
            saved = now
    trainer.save(state_path, step=step, spent=time.monotonic() - start, seen=seen)
    export()


if __name__ == "__main__":
    typer.run(main)
