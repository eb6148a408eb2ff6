"""Generate text with the Python API: build (or open) an engine, run a batch, look at the cache."""

from __future__ import annotations

import sys
from pathlib import Path

from minicache_trt import LLM, SamplingParams

model = sys.argv[1] if len(sys.argv) > 1 else str(Path(__file__).parent / "demo_model" / "checkpoint")
llm = LLM(model=model, method="kivi4")
outputs = llm.generate(
    ["The import statement", "def main(argv):"],
    SamplingParams(max_tokens=200, temperature=0.7, top_p=0.95, seed=1),
)
for output in outputs:
    print(f"--- {output.prompt}{output.outputs[0].text}")
stats = llm.statistics
print(f"{stats.decode_tokens_per_second:.0f} tokens/s, {stats.demotions} blocks compressed")
