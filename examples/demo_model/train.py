"""Train the tiny Llama-style demo model on the Python standard library.

The corpus is the standard library of the running interpreter: its source files,
its docstrings and the reference topics behind ``help("TOPIC")``.  A share of the
training rows are repeated segments, so the model learns to copy from its context.

    python train.py --minutes 45 --output checkpoint
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import math
import os
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS, EOS, VOCAB = 0, 1, 3072
SKIP_DIRS = {"test", "tests", "site-packages", "dist-packages", "turtledemo", "encodings", "pydoc_data"}
BATCH_TOKENS = 4096
LENGTHS, LENGTH_SHARES = (512, 1024, 2048), (0.8, 0.1, 0.1)
RECALL_SHARE, TOPIC_SHARE, DOCSTRING_SHARE = 0.30, 0.15, 0.20  # the rest is source code
PROMPTS = ("The import statement", "def __init__(self", "The with statement is used to")


@dataclass
class Corpus:
    """Text documents by kind: source code, docstrings and help topics."""

    code: list[str]
    docstrings: list[str]
    topics: list[str]


def held_out(name: str) -> bool:
    """Whether a document belongs to the held-out ~3 %, decided by its name only."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 1000 < 30


def docstrings(source: str) -> list[str]:
    """All module, class and function docstrings of a source text."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(ast.parse(source)) if isinstance(node, kinds))
    return [text for text in found if text and len(text) > 80]


def load_corpus() -> tuple[Corpus, Corpus]:
    """Read the standard library; return the training and the held-out corpus."""
    root = Path(sysconfig.get_paths()["stdlib"])
    train, held = Corpus([], [], []), Corpus([], [], [])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if SKIP_DIRS.intersection(name.parts):
            continue
        try:
            source = path.read_text(encoding="utf-8")
            texts = docstrings(source)
        except (UnicodeDecodeError, SyntaxError):
            continue
        part = held if held_out(name.as_posix()) else train
        part.code.append(source)
        part.docstrings.extend(texts)
    tree = ast.parse((root / "pydoc_data" / "topics.py").read_text(encoding="utf-8"))
    table = next(node.value for node in tree.body if isinstance(node, ast.Assign))
    for name, text in sorted(ast.literal_eval(table).items()):
        (held if held_out(f"topics/{name}") else train).topics.append(text)
    return train, held


def train_tokenizer(texts: list[str], vocab: int = VOCAB, context: int = 2048) -> PreTrainedTokenizerFast:
    """Byte-level BPE of some texts."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


def stream(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> np.ndarray:
    """Concatenate documents, each closed by the end token, into one id array."""
    ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return np.concatenate([np.array([*row, EOS], dtype=np.int64) for row in ids])


def window(source: np.ndarray, length: int, rng: np.random.Generator) -> np.ndarray:
    """A random contiguous piece of a stream."""
    start = rng.integers(0, len(source) - length)
    return source[start : start + length]


def make_batch(streams: dict[str, np.ndarray], seed: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets of one step; a pure function of its arguments."""
    rng = np.random.default_rng((seed, step))
    length = int(rng.choice(LENGTHS, p=LENGTH_SHARES))
    rows, targets = [], []
    for _ in range(BATCH_TOKENS // length):
        kind, noise = rng.random(), 0
        name = "topics" if kind < TOPIC_SHARE else "docstrings" if kind < TOPIC_SHARE + DOCSTRING_SHARE else "code"
        if kind >= 1 - RECALL_SHARE:  # a segment repeated until the row is full
            longest = 300 if rng.random() < 0.7 else length // 2
            period = int(np.exp(rng.uniform(np.log(4), np.log(longest))))  # short ones teach copying early
            if rng.random() < 0.7:
                segment, noise = rng.integers(2, VOCAB, period), period
            else:
                segment = window(streams[str(rng.choice(list(streams)))], period, rng)
            text = np.resize(segment, length)
        else:
            text = window(streams[name], length, rng)
        target = text.copy()
        target[:noise] = -100  # random tokens cannot be predicted the first time
        rows.append(np.concatenate([[BOS], text[:-1]]))
        targets.append(target)
    return torch.from_numpy(np.stack(rows)), torch.from_numpy(np.stack(targets))


class BlockCausalAttention(torch.autograd.Function):
    """Causal attention in query blocks; on CPU its backward beats the built-in one."""

    BLOCK = 128

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Attend block by block, keeping the probabilities."""
        n, out, probs = BlockCausalAttention.BLOCK, torch.empty_like(q), []
        future = torch.ones(n, n, dtype=torch.bool).triu(1)
        for s in range(0, q.shape[2], n):
            scores = q[:, :, s : s + n] @ k[:, :, : s + n].transpose(2, 3)
            scores[..., s:].masked_fill_(future, float("-inf"))
            probs.append(scores.softmax(-1))
            out[:, :, s : s + n] = probs[-1] @ v[:, :, : s + n]
        ctx.save_for_backward(q, k, v, *probs)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients of the scaled queries, the keys and the values."""
        q, k, v, *probs = ctx.saved_tensors
        n, dq, dk, dv = BlockCausalAttention.BLOCK, torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for i, p in enumerate(probs):
            s = i * n
            g = grad[:, :, s : s + n]
            dv[:, :, : s + n] += p.transpose(2, 3) @ g
            dp = g @ v[:, :, : s + n].transpose(2, 3)
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
            dq[:, :, s : s + n] = ds @ k[:, :, : s + n]
            dk[:, :, : s + n] += ds.transpose(2, 3) @ q[:, :, s : s + n]
        return dq, dk, dv


@torch.compiler.disable
def block_attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: None, scaling: float, **_: Any
) -> tuple[torch.Tensor, None]:
    """Adapter with the signature `transformers` expects; rows are never padded."""
    key, value = (x.repeat_interleave(module.num_key_value_groups, 1) for x in (key, value))
    out = BlockCausalAttention.apply((query * scaling).contiguous(), key, value)
    return out.transpose(1, 2).contiguous(), None


def fastest_dtype(device: str = "cpu") -> torch.dtype:
    """bfloat16 where the device multiplies it fast: GPUs, CPUs with instructions for it (AVX2 is 20 times slower)."""
    fast = device != "cpu" or torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised updates in ``dtype``; matrices of one shape are handled as one batch."""

    def __init__(self, params: list[torch.Tensor], lr: float, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__(params, {"lr": lr})
        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:
        """Apply one update from the gradients."""
        (group,) = self.param_groups
        by_shape: dict[torch.Size, list[torch.Tensor]] = {}
        for p in group["params"]:
            by_shape.setdefault(p.shape, []).append(p)
        for shape, params in by_shape.items():
            updates = []
            for p in params:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 0.05)
                updates.append(p.grad.lerp(momentum, 0.95))
            x = torch.stack(updates).to(self.dtype)
            x = x.mT.contiguous() if shape[0] > shape[1] else x
            x /= x.norm(dim=(1, 2), keepdim=True) + 1e-7
            for _ in range(5):  # Newton-Schulz iteration towards the nearest orthogonal matrix
                a = x @ x.mT
                x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
            x = x.mT if shape[0] > shape[1] else x
            scale = max(1.0, shape[0] / shape[1]) ** 0.5
            for p, update in zip(params, x.float(), strict=True):
                p.add_(update, alpha=-group["lr"] * scale)


def build_model() -> LlamaForCausalLM:
    """A fresh ~3.5M parameter model."""
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=192, intermediate_size=384, num_hidden_layers=8,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, rms_norm_eps=1e-6,
        max_position_embeddings=2048, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def write_checkpoint(
    model: LlamaForCausalLM, weights: list[torch.Tensor], tokenizer: PreTrainedTokenizerFast, output: Path
) -> None:
    """Write ``model`` with ``weights``, in the order of its parameters, as an fp16 checkpoint; replaces files."""
    with torch.no_grad():
        for parameter, weight in zip(model.parameters(), weights, strict=True):
            parameter.copy_(weight)
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as temporary:
        model.half().save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        settings = Path(temporary, "tokenizer_config.json")  # a class name every release knows
        values = json.loads(settings.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
        settings.write_text(json.dumps(values, indent=2) + "\n")
        for path in Path(temporary).iterdir():
            path.chmod(0o644)
            os.replace(path, output / path.name)


def train(args: argparse.Namespace, streams: dict[str, np.ndarray], tokenizer: PreTrainedTokenizerFast) -> int:
    """Run or resume training, export the result, return the number of tokens seen."""
    AttentionInterface.register("block_causal", block_attention)
    model = build_model()
    model.set_attn_implementation("block_causal")
    model.config.use_cache = False
    master = [p.detach().clone().requires_grad_() for p in model.parameters()]  # fp32
    for p in model.parameters():
        p.data = p.data.to(fastest_dtype())
    embedding = model.get_input_embeddings().weight
    hidden = [m for p, m in zip(model.parameters(), master, strict=True) if p.dim() == 2 and p is not embedding]
    others = [m for p, m in zip(model.parameters(), master, strict=True) if p.dim() == 1 or p is embedding]
    optimizers = (
        torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
        Muon(hidden, lr=args.muon_lr, dtype=fastest_dtype()),
    )
    step, spent = 0, 0.0
    if args.state.exists():
        state = torch.load(args.state)
        step, spent = state["step"], state["spent"]
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        with torch.no_grad():
            for p, m, saved in zip(model.parameters(), master, state["master"], strict=True):
                m.copy_(saved)
                p.copy_(saved)
    if args.compile:
        for layer in model.model.layers:
            layer.compile(dynamic=False)
    last = saved_at = time.monotonic()
    start = last - spent
    losses: list[float] = []
    # Done after --steps steps or --minutes minutes; the schedule follows whichever is nearer.
    while (progress := max(step / args.steps, (time.monotonic() - start) / 60 / args.minutes)) < 1:
        rate = min(1.0, (step + 1) / 50) * (0.02 + 0.98 * (1 + math.cos(math.pi * progress)) / 2)
        inputs, targets = make_batch(streams, args.seed, step)
        logits = model.lm_head(model.model(input_ids=inputs).last_hidden_state)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())  # bf16 is too coarse here
        loss.backward()
        for p, m in zip(model.parameters(), master, strict=True):
            m.grad, p.grad = p.grad.float(), None
        torch.nn.utils.clip_grad_norm_(master, 1.0)
        for optimizer, peak in zip(optimizers, (args.lr, args.muon_lr), strict=True):
            optimizer.param_groups[0]["lr"] = rate * peak
            optimizer.step()
        with torch.no_grad():
            for p, m in zip(model.parameters(), master, strict=True):
                p.copy_(m)
        step += 1
        losses.append(loss.item())
        now = time.monotonic()
        if step % args.log_steps == 0:
            print(
                f"step {step} loss {np.mean(losses):.3f} rate {rate:.3f} "
                f"tok/s {len(losses) * BATCH_TOKENS / (now - last):.0f} minutes {(now - start) / 60:.1f}",
                flush=True,
            )
            losses, last = [], now
        if now - saved_at > 60 * args.save_minutes:
            saved = [optimizer.state_dict() for optimizer in optimizers]
            state = {"step": step, "spent": now - start, "master": master, "optimizers": saved}
            torch.save(state, args.state)
            write_checkpoint(build_model(), master, tokenizer, args.output)
            saved_at = now
    write_checkpoint(build_model(), master, tokenizer, args.output)
    args.state.unlink(missing_ok=True)
    return step * BATCH_TOKENS


@torch.no_grad()
def evaluate(output: Path, held: Corpus, seed: int) -> None:
    """Print held-out perplexity, recall accuracy and sample generations."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(output)
    model = LlamaForCausalLM.from_pretrained(output, dtype=torch.float32).eval()
    for name in ("code", "docstrings", "topics"):
        ids = stream(tokenizer, getattr(held, name))
        rows = torch.from_numpy(ids[: len(ids) // 511 * 511].reshape(-1, 511))[:64]
        rows = F.pad(rows, (1, 0), value=BOS)
        loss = torch.stack([model(row[None], labels=row[None]).loss for row in rows]).mean()
        print(f"held-out perplexity, {name}: {loss.exp():.2f} ({rows.numel()} tokens)", flush=True)
    rng = np.random.default_rng(seed)
    text = stream(tokenizer, held.code)
    for name in ("random tokens", "held-out code"):
        segments = [rng.integers(2, VOCAB, 150) if name[0] == "r" else window(text, 150, rng) for _ in range(32)]
        rows = torch.from_numpy(np.stack([np.concatenate([[BOS], np.resize(s, 511)]) for s in segments]))
        hits = model(rows).logits[:, 151:-1].argmax(-1) == rows[:, 152:]  # from the second repeated token on
        print(f"recall, 150 {name} repeated to 512: {hits.float().mean():.4f}", flush=True)
    torch.manual_seed(seed)
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        for options in ({"do_sample": False}, {"do_sample": True, "temperature": 0.7, "top_p": 0.9}):
            ids = model.generate(**inputs, max_new_tokens=120, pad_token_id=EOS, **options)
            print(f"--- {prompt!r} {options}\n{tokenizer.decode(ids[0], skip_special_tokens=True)}", flush=True)


def main() -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = Path(__file__).parent
    parser.add_argument("--output", type=Path, default=here / "checkpoint", help="checkpoint folder")
    parser.add_argument("--state", type=Path, default=here / "train_state.pt", help="file to resume from")
    parser.add_argument("--minutes", type=float, default=45.0, help="time budget of the training loop")
    parser.add_argument("--steps", type=int, default=8000, help=f"step budget, {BATCH_TOKENS} tokens each")
    parser.add_argument("--save-minutes", type=float, default=5.0, help="time between intermediate checkpoints")
    parser.add_argument("--log-steps", type=int, default=50, help="steps between progress lines")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak rate of AdamW: embedding, norms")
    parser.add_argument("--muon-lr", type=float, default=0.02, help="peak rate of Muon: weight matrices")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="compile the layers (needs a C++ compiler)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    torch.manual_seed(args.seed)
    corpus, held = load_corpus()
    tokenizer = train_tokenizer(corpus.topics * 4 + corpus.docstrings * 2 + corpus.code)  # prose counts more
    streams = {name: stream(tokenizer, getattr(corpus, name)) for name in ("code", "docstrings", "topics")}
    print("tokens:", {name: len(ids) for name, ids in streams.items()}, flush=True)
    tokens = train(args, streams, tokenizer)
    print(f"trained on {tokens / 1e6:.1f}M tokens", flush=True)
    evaluate(args.output, held, args.seed)


if __name__ == "__main__":
    main()
