"""Averaged weights: an exponential moving average over tokens, measured beside the last weights."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch

from raysweep.training.optimizer import Parameters, Parts


class Average:
    """Of all that this worker holds.

    Weights of the steps before count by exp(-tokens since / `tokens`), and all together one: the
    start, when there are few, is no special case.
    """

    def __init__(self, parameters: Parameters, tokens: float, batch_tokens: int) -> None:
        self._parameters = parameters
        self._keep = math.exp(-batch_tokens / tokens)
        self._mean = [value.clone() for value in parameters.values()]

    @torch.no_grad()
    def add(self, steps: int) -> None:
        """Take in the weights after so many steps; call it after each."""
        share = (1 - self._keep) / (1 - self._keep**steps)
        for mean, value in zip(self._mean, self._parameters.values(), strict=True):
            mean.lerp_(value, share)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has the averaged weights meanwhile."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def parts(self) -> Parts:
        """What a checkpoint keeps of it: views."""
        named = self._parameters.named(self._mean)
        return {f"average/{name}": part for name, part in named.items()}

    @torch.no_grad()
    def _swap(self) -> None:
        for value, mean in zip(self._parameters.values(), self._mean, strict=True):
            last = value.clone()
            value.copy_(mean)
            mean.copy_(last)
