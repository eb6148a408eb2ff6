"""``minicache-trt compare --against PROGRAM``: the engine's greedy tokens against another program's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich import box

from minicache_trt.benchmark.peers import Peer, PeerCommand, hugging_face, tensorrt_llm
from minicache_trt.cli.console import print_json, progress_bars, stdout, table
from minicache_trt.compare import greedy_continuations
from minicache_trt.engine_directory import EngineInfo
from minicache_trt.runtime.llm import LLM

PEERS = ("hf", "tensorrt-llm")
"""Programs that run the engine's own checkpoint; an export of another program is compared by ``bench``."""


@dataclass(frozen=True)
class TokenAgreement:
    """One prompt: how long two greedy continuations are the same, and in how many places they are."""

    prompt_tokens: int
    generated_tokens: int
    common_prefix: int
    same: int


def peer_command(name: str, engine: Path, info: EngineInfo, threads: int | None, python: Path | None) -> PeerCommand:
    """How the other program is started on the engine's checkpoint."""
    if name == "tensorrt-llm":
        return tensorrt_llm(python, engine, 1, info.build.max_seq_len)
    return hugging_face(engine, threads, 16)


def compare_tokens(
    llm: LLM, command: PeerCommand, prompts: Sequence[str], max_tokens: int, progress: Callable[[int, int], None]
) -> list[TokenAgreement]:
    """Continue each prompt greedily with both sides, one prompt at a time."""
    peer = Peer(command)
    try:
        sequences, lengths = greedy_continuations(llm, prompts, max_tokens)
        rows = []
        for done, (tokens, length) in enumerate(zip(sequences, lengths, strict=True)):
            progress(done, len(sequences))
            mine = tokens[length:]
            theirs = list(peer.run([tokens[:length]], len(mine)).tokens[0])
            equal = [a == b for a, b in zip(mine, theirs, strict=False)]
            prefix = equal.index(False) if False in equal else len(equal)
            rows.append(TokenAgreement(length, len(mine), prefix, sum(equal)))
        progress(len(sequences), len(sequences))
    finally:
        peer.close()
    return rows


def report_tokens(
    llm: LLM, command: PeerCommand, prompts: Sequence[str], max_tokens: int, engine: Path, json: bool
) -> None:
    """Compare and print."""
    with progress_bars(not json) as report:
        rows = compare_tokens(llm, command, prompts, max_tokens, lambda done, total: report("compare", done, total))
    if json:
        print_json({"engine": str(engine), "against": command.name, "prompts": [asdict(row) for row in rows]})
        return
    result = table(f"Greedy tokens of the engine and of {command.name}", "prompt", "tokens", "same until", "same")
    result.box = box.SIMPLE
    for index, row in enumerate(rows):
        same = f"{100 * row.same / max(1, row.generated_tokens):.1f} %"
        lengths = f"{row.prompt_tokens}+{row.generated_tokens}"
        result.add_row(str(index), lengths, f"{row.common_prefix}/{row.generated_tokens}", same)
    stdout.print(result)
