"""Learning rate and Adam's beta2 as functions of tokens."""

from __future__ import annotations

import math

from raysweep.study.trials import Recipe


def learning_rate(recipe: Recipe, peak: float, tokens: float, horizon: float) -> float:
    """The learning rate at a point of the run, `tokens` of `horizon`.

    Linear warm-up from zero to the peak, then by `recipe.schedule`: a half cosine or a line to the
    final rate (Bergsma et al. 2025, arXiv 2502.15938, on lines to zero); constant; or constant with
    a decay to the final rate over the last `decay_fraction` (WSD, Hu et al. 2024, arXiv
    2404.06395), along a line or 1 - sqrt(t) (Hägele et al. 2024, arXiv 2405.18392). All are
    continuous in tokens; a step takes the value at the middle of its batch, so that runs of
    different batch size follow one curve.
    """
    warmup = recipe.warmup(horizon)
    if tokens < warmup:
        return peak * tokens / warmup
    final = recipe.final_lr_fraction * peak if recipe.final_lr is None else recipe.final_lr
    final = min(final, peak)
    if recipe.schedule == "constant":
        return peak
    start = recipe.decay_start(horizon)
    if tokens <= start:
        return peak
    done = min(1.0, (tokens - start) / (horizon - start)) if horizon > start else 1.0
    if recipe.schedule == "cosine":
        share = (1 + math.cos(math.pi * done)) / 2
    else:
        share = 1 - (math.sqrt(done) if recipe.decay_shape == "1-sqrt" else done)
    return final + (peak - final) * share


def beta2(recipe: Recipe, batch_tokens: int) -> float:
    """Adam's second-moment decay a step, fixed or with a fixed averaging time in tokens."""
    if recipe.beta2_rule == "fixed":
        return recipe.beta2
    return recipe.beta2 ** (batch_tokens / recipe.beta2_reference_tokens)
