"""A worker of `minicache_trt.benchmark.peers` that generates nothing; run as a script, whatever its arguments.

Prompts that begin with ``CRASH`` or ``NOISE`` make it fail.
"""

from __future__ import annotations

import json
import sys

CRASH, NOISE = 7, 8
FIRST_TOKEN, STEP = 0.25, 0.125
"""Seconds it claims."""

if __name__ == "__main__":
    print(json.dumps({"name": "fake", "version": "1.2", "settings": {"arguments": sys.argv[1:]}}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        prompts, count = request["prompts"], request["new_tokens"]
        if prompts[0][0] == CRASH:
            sys.exit("RuntimeError: it crashed")
        if prompts[0][0] == NOISE:
            print("not JSON", flush=True)
            continue
        answer = {
            "first_tokens": [FIRST_TOKEN] * len(prompts),
            "steps": [STEP] * (count - 1),
            "tokens": [[sum(prompt) % 97] * count for prompt in prompts],
        }
        print(json.dumps(answer), flush=True)
