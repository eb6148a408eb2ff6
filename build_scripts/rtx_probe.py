"""Do TensorRT-RTX engines run on this GPU? Builds the demo model's engines, compares their logits with the same graphs
in ONNX Runtime on the CPU, times decoding, and writes what was found as JSON. Has never run: no GPU was at hand."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

CHECKPOINT = ROOT / "examples" / "demo_model" / "checkpoint"
PROMPT_TOKENS, NEW_TOKENS, BATCH = 200, 100, 8


def probe(method: str, directory: Path) -> dict[str, Any]:
    """One method in float16: agreement with the CPU, and tokens per second."""
    import numpy as np

    from minicache_trt.build import build_engine, load_engine
    from minicache_trt.compression.methods import make_plan
    from minicache_trt.config import BuildConfig
    from minicache_trt.runtime.llm import LLM
    from minicache_trt.runtime.request import SamplingParams

    limits = BuildConfig(BATCH, 512, 512, backend="tensorrt-rtx", dtype="float16")
    build_engine(str(CHECKPOINT), directory, lambda config: (make_plan(config, method), limits))
    llm = LLM.from_engine(load_engine(directory))
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, llm.engine.model.vocab_size, PROMPT_TOKENS + NEW_TOKENS).tolist() for _ in range(2)]
    scores = {
        name: LLM.from_engine(load_engine(directory, backend=name)).score(sequences, [PROMPT_TOKENS] * 2)
        for name in ("tensorrt-rtx", "onnxruntime")
    }
    pairs = list(zip(*scores.values(), strict=True))
    params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True)
    prompts = [{"prompt_token_ids": sequences[0][: PROMPT_TOKENS - i]} for i in range(BATCH)]
    llm.generate(prompts, params)  # compiles kernels and captures graphs
    start = time.perf_counter()
    llm.generate(prompts, params)
    seconds = time.perf_counter() - start
    return {
        "method": method,
        "max_abs_diff": max(float(np.abs(a - b).max()) for a, b in pairs),
        "mean_abs_diff": float(np.mean([np.abs(a - b).mean() for a, b in pairs])),
        "same_top1": float(np.mean([(a.argmax(-1) == b.argmax(-1)).mean() for a, b in pairs])),
        "tokens_per_second": BATCH * NEW_TOKENS / seconds,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--methods", default="full,kivi4,minicache4")
    arguments = parser.parse_args()
    import torch

    from minicache_trt.backends.tensorrt.module import load_module
    from minicache_trt.errors import UserError

    try:
        trt = load_module("tensorrt-rtx")
        if not torch.cuda.is_available():
            raise UserError("rtx_probe needs an NVIDIA GPU, and PyTorch finds none", "run it on a machine with one")
    except UserError as error:
        print(f"error: {error.cause}; {error.remedy}", file=sys.stderr)
        return 2
    properties = torch.cuda.get_device_properties(0)
    found: dict[str, Any] = {
        "gpu": properties.name,
        "sm": f"{properties.major}.{properties.minor}",
        "tensorrt_rtx": trt.__version__,
        "results": [],
    }
    for method in arguments.methods.split(","):
        with tempfile.TemporaryDirectory() as temporary:
            try:
                found["results"].append(probe(method, Path(temporary) / "engine"))
            except Exception as error:  # what fails on this GPU is the finding
                found["results"].append({"method": method, "error": str(error).splitlines()[0][:300]})
        print(found["results"][-1])
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    return int(any("error" in result for result in found["results"]))


if __name__ == "__main__":
    sys.exit(main())
