"""Changes of logits that depend on the tokens so far."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from minicache_trt.runtime.sampling_params import SamplingParams


def changes_logits(params: SamplingParams) -> bool:
    """Whether `change_logits` does anything."""
    plain = params.repetition_penalty == 1.0 and params.presence_penalty == params.frequency_penalty == 0.0
    return not plain or bool(params.logit_bias)


def change_logits(scores: NDArray[np.float64], params: SamplingParams, token_ids: list[int], prompt_len: int) -> None:
    """Apply logit bias and penalties in place.

    Parameters
    ----------
    scores : float64 ``[vocab]``
    params : SamplingParams
    token_ids : list of int
        Prompt and output so far. The repetition penalty counts both, the other two the output only.
    prompt_len : int
        Tokens of the prompt.
    """
    if params.logit_bias:
        scores[list(params.logit_bias)] += list(params.logit_bias.values())
    if params.repetition_penalty != 1.0:
        seen = np.asarray(token_ids)
        values = scores[seen]
        penalty = params.repetition_penalty
        scores[seen] = np.where(values > 0, values / penalty, values * penalty)
    output = token_ids[prompt_len:]
    if output and (params.presence_penalty or params.frequency_penalty):
        tokens, counts = np.unique(output, return_counts=True)
        scores[tokens] -= params.frequency_penalty * counts + params.presence_penalty
