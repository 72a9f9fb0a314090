"""Parameters in flat buffers, so that clipping, zeroing and AdamW are a few large operations."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from raysweep.model.initial import local_part
from raysweep.study.trials import Recipe
from raysweep.training import schedule

MAX_DOT = 1 << 30
"""CUDA's dot product takes fewer than 2^31 elements."""
MOMENTS = ("exp_avg", "exp_avg_sq")
"""Of AdamW, by its own names."""
_ALIGN = 16
"""Every parameter starts at a multiple of this many elements: 64 bytes in float32."""


Parts = dict[str, tuple[int, Tensor]]
"""What a worker holds of named tensors: a contiguous part of each, flat, and where it begins in the
whole."""


class Parameters(Protocol):
    """What the loop does to parameters and gradients as a whole."""

    groups: tuple[list[nn.Parameter], list[nn.Parameter]]
    """Those that decay, and those that do not (`decays`)."""

    def gradients(self) -> list[Tensor]:
        """This worker's gradient tensors, together all it holds."""
        ...

    def zero(self) -> None:
        """Set the gradient to zero."""
        ...

    def parts(self, optimizer: torch.optim.Optimizer) -> Parts:
        """What this worker holds of all values and moments: views, to be read or written."""
        ...


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: to matrices but the embedding and the routers."""
    return parameter.ndim > 1 and name != "embedding" and not name.endswith("router.weight")


class FlatParameters:
    """One buffer of values and one of gradients; the model's own become views of them."""

    def __init__(self, model: nn.Module) -> None:
        named = dict(model.named_parameters())
        order = sorted(named, key=lambda name: not decays(name, named[name]))
        self._spans: dict[str, slice] = {}
        end, n_decaying = 0, 0
        for name in order:
            self._spans[name] = slice(end, end + named[name].numel())
            end += -(-named[name].numel() // _ALIGN) * _ALIGN
            n_decaying = end if decays(name, named[name]) else n_decaying
        self.values = named[order[0]].new_zeros(end, requires_grad=False)
        self.grad = torch.zeros_like(self.values)
        for name, span in self._spans.items():
            parameter = named[name]
            self.values[span] = parameter.detach().flatten()
            parameter.data = self.values[span].view_as(parameter)
            parameter.grad = self.grad[span].view_as(parameter)
        self.groups = ([], [])
        self._starts = (0, n_decaying)
        for group, span in zip(
            self.groups, (slice(0, n_decaying), slice(n_decaying, end)), strict=True
        ):
            part = nn.Parameter(self.values[span])
            part.grad = self.grad[span]
            group.append(part)

    def gradients(self) -> list[Tensor]:
        return [self.grad]

    def zero(self) -> None:
        self.grad.zero_()

    def parts(self, optimizer: torch.optim.Optimizer) -> Parts:
        parts: Parts = {}
        for name, span in self._spans.items():
            group = int(span.start >= self._starts[1])
            state, begin = optimizer.state[self.groups[group][0]], self._starts[group]
            parts[f"value/{name}"] = 0, self.values[span]
            for moment in MOMENTS:
                parts[f"{moment}/{name}"] = 0, state[moment][span.start - begin : span.stop - begin]
        return parts


class ShardedParameters:
    """The model's own parameters, each spread over the workers (FSDP2)."""

    def __init__(self, model: nn.Module) -> None:
        self._named = dict(model.named_parameters())
        self.groups = ([], [])
        for name, parameter in self._named.items():
            self.groups[not decays(name, parameter)].append(parameter)

    def gradients(self) -> list[Tensor]:
        both = (p for group in self.groups for p in group)
        return [p.grad.to_local() for p in both if p.grad is not None]  # type: ignore[attr-defined]

    def zero(self) -> None:
        for group in self.groups:
            for parameter in group:
                parameter.grad = None

    def parts(self, optimizer: torch.optim.Optimizer) -> Parts:
        parts: Parts = {}
        for name, parameter in self._named.items():
            local, start = local_part(parameter)
            parts[f"value/{name}"] = start, local.view(-1)
            for moment in MOMENTS:
                held, _ = local_part(optimizer.state[parameter][moment])
                parts[f"{moment}/{name}"] = start, held.view(-1)
        return parts


def squared_norm(gradients: list[Tensor]) -> Tensor:
    """Sum of squares of this worker's gradient tensors, as a scalar tensor."""
    if len(gradients) == 1:
        dots = [torch.dot(part, part) for part in gradients[0].split(MAX_DOT)]
        return dots[0] if len(dots) == 1 else torch.stack(dots).sum()
    return torch.stack([g.square().sum() for g in gradients]).sum()


def clip(gradients: list[Tensor], norm: Tensor, limit: float) -> None:
    """Scale gradients whose norm exceeds the limit down to it, without waiting for the device."""
    factor = torch.clamp(limit / (norm + 1e-6), max=1.0)
    for gradient in gradients:
        gradient.mul_(factor)


def build_optimizer(parameters: Parameters, recipe: Recipe, batch_tokens: int) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019) as the recipe has it; set the learning rate each step.

    Its moments are made here, not at the first step: what memory is left is known at once.
    """
    decaying, others = parameters.groups
    optimizer = torch.optim.AdamW(
        [
            {"params": decaying, "weight_decay": recipe.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=0.0,
        betas=(recipe.beta1, schedule.beta2(recipe, batch_tokens)),
        eps=recipe.eps,
        fused=True,
    )
    for parameter in (*decaying, *others):
        optimizer.state[parameter] = {
            "step": torch.zeros((), device=parameter.device),
            **{moment: torch.zeros_like(parameter.detach()) for moment in MOMENTS},
        }
    return optimizer


def set_step(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Have the optimizer go on as after so many steps."""
    for state in optimizer.state.values():
        state["step"].fill_(step)
