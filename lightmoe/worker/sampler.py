"""One token from one row of logits.

The random number comes from (seed, position) alone, by a counter-based generator (Philox, Salmon
et al. 2011): a choice depends neither on the batch nor on what was computed before it.
"""

from __future__ import annotations

import numpy as np

from lightmoe.core import SampledToken, SamplingStep

INVALID_TOKEN = -1
"""Chosen when the logits are not finite: the engine ends that request with an error."""


def sample(sequence_id: int, logits: np.ndarray, step: SamplingStep) -> SampledToken:
    """Choose from fp32 logits [V]; log-probabilities are those of the raw logits, as in vLLM."""
    if not np.isfinite(logits).all():
        return SampledToken(sequence_id, INVALID_TOKEN)
    adjusted = _with_penalties(logits, step)
    token = int(adjusted.argmax()) if step.temperature == 0 else _draw(adjusted, step)
    if step.num_logprobs < 0:
        return SampledToken(sequence_id, token)
    logprobs = _log_softmax(logits)
    best = np.argsort(-logprobs, kind="stable")[: step.num_logprobs]
    top = tuple((int(candidate), float(logprobs[candidate])) for candidate in best)
    return SampledToken(sequence_id, token, float(logprobs[token]), top)


def uniform(step: SamplingStep) -> float:
    """The random number of this step, 0 <= number < 1."""
    key = np.array([step.seed, step.position], dtype=np.int64).view(np.uint64)
    return float(np.random.Generator(np.random.Philox(key=key)).random())


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max()
    logprobs: np.ndarray = shifted - np.log(np.exp(shifted).sum())
    return logprobs


def _with_penalties(logits: np.ndarray, step: SamplingStep) -> np.ndarray:
    """Banned tokens out; repetition (Keskar et al. 2019), presence and frequency penalties."""
    adjusted = logits.astype(np.float64)
    if step.history:
        seen = np.unique(np.asarray(step.history))
        scale = np.where(adjusted[seen] > 0, 1.0 / step.repetition_penalty, step.repetition_penalty)
        adjusted[seen] *= scale
        output, counts = np.unique(step.history[step.num_prompt_tokens :], return_counts=True)
        if len(output):
            output = output.astype(np.int64)
            adjusted[output] -= step.presence_penalty + step.frequency_penalty * counts
    if step.banned_ids:
        adjusted[list(step.banned_ids)] = -np.inf
    return adjusted


def _draw(logits: np.ndarray, step: SamplingStep) -> int:
    # A temperature near zero must sharpen, not overflow.
    probabilities = np.exp(_log_softmax(logits / max(step.temperature, 1e-5)))
    filtered = step.top_k > 0 or step.top_p < 1.0 or step.min_p > 0.0
    # Without a filter any fixed order will do, and sorting would cost most of the draw.
    order = np.argsort(-probabilities, kind="stable") if filtered else np.arange(len(probabilities))
    if step.top_k > 0:
        order = order[: step.top_k]
    kept = probabilities[order]
    if step.top_p < 1.0:
        mass_before = kept.cumsum() - kept
        kept = kept[mass_before < step.top_p * kept.sum()]
    if step.min_p > 0.0:
        kept = kept[kept >= step.min_p * kept[0]]
    point = uniform(step) * kept.sum()
    return int(order[min(int(np.searchsorted(kept.cumsum(), point, side="right")), len(kept) - 1)])
