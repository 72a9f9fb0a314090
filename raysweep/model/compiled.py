"""Compiled blocks: each function once a process, kept over the trials that run in it."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch

MAX_KINDS = 16
"""Kinds of runs (shape, micro-batch, precision) whose graphs are kept; then all are forgotten."""
GRAPHS_A_KIND = 8
"""Of one function, at most: in training, in evaluation, with activations kept or not."""
BACKEND: str | Callable[..., Any] = "inductor"

_compiled: dict[Callable[..., Any], Callable[..., Any]] = {}
_kinds: set[Hashable] = set()

F = TypeVar("F", bound=Callable[..., Any])


def compiled(function: F) -> F:
    """The function, compiled for each combination of shapes that it meets.

    Graphs are guarded by shapes and numbers only, as blocks are functions of tensors: all layers
    of a model share one, and so do all models of a shape.
    """
    if function not in _compiled:
        import torch._dynamo.config as dynamo  # it costs a process 0.7 s

        config: Any = dynamo
        # Past its limit a function would silently run uncompiled: by default from the ninth on.
        config.recompile_limit = MAX_KINDS * GRAPHS_A_KIND
        config.accumulated_recompile_limit = 64 * MAX_KINDS * GRAPHS_A_KIND
        _compiled[function] = torch.compile(
            function, backend=BACKEND, dynamic=False, fullgraph=True
        )
    return _compiled[function]  # type: ignore[return-value]


def make_room(kind: Hashable) -> None:
    """Announce a run of this kind: where too many others ran before, forget their graphs."""
    if kind not in _kinds and len(_kinds) >= MAX_KINDS:
        forget()
    _kinds.add(kind)


def forget() -> None:
    """Forget all graphs."""
    _kinds.clear()
    _compiled.clear()
    torch.compiler.reset()
