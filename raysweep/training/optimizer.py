"""Parameters in flat buffers, so that clipping, zeroing and AdamW are a few large operations."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from raysweep.study.trials import Recipe
from raysweep.training import schedule

LONGEST_DOT = 1 << 30
"""CUDA's dot product takes fewer than 2^31 elements."""
_ALIGN = 16
"""Every parameter starts at a multiple of this many elements: 64 bytes in float32."""


class Parameters(Protocol):
    """What the loop does to parameters and gradients as a whole."""

    groups: tuple[list[nn.Parameter], list[nn.Parameter]]
    """Matrices, which decay, and gains, which do not."""

    def gradients(self) -> list[Tensor]:
        """This worker's gradient tensors, together all it holds."""
        ...

    def zero(self) -> None:
        """Set the gradient to zero."""
        ...


class FlatParameters:
    """One buffer of values and one of gradients; the model's own become views of them."""

    def __init__(self, model: nn.Module) -> None:
        parameters = list(model.parameters())
        order = [p for p in parameters if p.ndim > 1] + [p for p in parameters if p.ndim == 1]
        starts, end, n_matrices = [], 0, 0
        for parameter in order:
            starts.append(end)
            end += -(-parameter.numel() // _ALIGN) * _ALIGN
            n_matrices = end if parameter.ndim > 1 else n_matrices
        self.values = order[0].new_zeros(end, requires_grad=False)
        self.grad = torch.zeros_like(self.values)
        for parameter, start in zip(order, starts, strict=True):
            span = slice(start, start + parameter.numel())
            self.values[span] = parameter.detach().flatten()
            parameter.data = self.values[span].view_as(parameter)
            parameter.grad = self.grad[span].view_as(parameter)
        self.groups = ([], [])
        for group, span in zip(
            self.groups, (slice(0, n_matrices), slice(n_matrices, end)), strict=True
        ):
            part = nn.Parameter(self.values[span])
            part.grad = self.grad[span]
            group.append(part)

    def gradients(self) -> list[Tensor]:
        return [self.grad]

    def zero(self) -> None:
        self.grad.zero_()


class ShardedParameters:
    """The model's own parameters, each spread over the workers (FSDP2)."""

    def __init__(self, model: nn.Module) -> None:
        parameters = list(model.parameters())
        self.groups = (
            [p for p in parameters if p.ndim > 1],
            [p for p in parameters if p.ndim == 1],
        )

    def gradients(self) -> list[Tensor]:
        both = (p for group in self.groups for p in group)
        return [p.grad.to_local() for p in both if p.grad is not None]  # type: ignore[attr-defined]

    def zero(self) -> None:
        for group in self.groups:
            for parameter in group:
                parameter.grad = None


def squared_norm(gradients: list[Tensor]) -> Tensor:
    """Sum of squares of this worker's gradient tensors, as a scalar tensor."""
    if len(gradients) == 1:
        dots = [torch.dot(part, part) for part in gradients[0].split(LONGEST_DOT)]
        return dots[0] if len(dots) == 1 else torch.stack(dots).sum()
    return torch.stack([g.square().sum() for g in gradients]).sum()


def clip(gradients: list[Tensor], norm: Tensor, limit: float) -> None:
    """Scale gradients whose norm exceeds the limit down to it, without waiting for the device."""
    factor = torch.clamp(limit / (norm + 1e-6), max=1.0)
    for gradient in gradients:
        gradient.mul_(factor)


def build_optimizer(parameters: Parameters, recipe: Recipe, batch_tokens: int) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019) as the recipe has it; set the learning rate each step."""
    matrices, gains = parameters.groups
    return torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": recipe.weight_decay},
            {"params": gains, "weight_decay": 0.0},
        ],
        lr=0.0,
        betas=(recipe.beta1, schedule.beta2(recipe, batch_tokens)),
        eps=recipe.eps,
        fused=True,
    )
