"""Parameters in flat buffers, so that clipping, zeroing and AdamW are a few large operations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from raysweep.model.initial import local_part
from raysweep.study.trials import Recipe
from raysweep.training import schedule
from raysweep.training.groups import Group, GroupOf
from raysweep.training.muon import Muon

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

    groups: list[tuple[Group, list[nn.Parameter]]]
    """Parameters that are trained alike; those that decay come first."""

    def gradients(self) -> list[Tensor]:
        """This worker's gradient tensors, together all it holds."""
        ...

    def values(self) -> list[Tensor]:
        """This worker's values, together all it holds."""
        ...

    def zero(self) -> None:
        """Set the gradient to zero."""
        ...

    def named(self, tensors: list[Tensor]) -> Parts:
        """Tensors that lie as `values` do, by parameter: views."""
        ...

    def moments(self, optimizer: Optimizers) -> Parts:
        """What this worker holds of the optimizer's moments: views, to be read or written."""
        ...


class FlatParameters:
    """One buffer of values and one of gradients; the model's own become views of them, and so does
    a parameter for each group that AdamW trains."""

    def __init__(self, model: nn.Module, group_of: GroupOf) -> None:
        self._named = dict(model.named_parameters())
        by_group = _by_group(self._named, group_of)
        self._spans: dict[str, slice] = {}
        bounds, end = [], 0
        for names in by_group.values():
            start = end
            for name in names:
                count = self._named[name].numel()
                self._spans[name] = slice(end, end + count)
                end += -(-count // _ALIGN) * _ALIGN
            bounds.append((start, end))
        first = next(iter(self._named.values()))
        self._values = first.new_zeros(end, requires_grad=False)
        self._grad = torch.zeros_like(self._values)
        for name, span in self._spans.items():
            parameter = self._named[name]
            self._values[span] = parameter.detach().flatten()
            parameter.data = self._values[span].view_as(parameter)
            parameter.grad = self._grad[span].view_as(parameter)
        self.groups = []
        self._flat: dict[str, tuple[nn.Parameter, int]] = {}
        for (group, names), (start, end) in zip(by_group.items(), bounds, strict=True):
            if group.muon:
                self.groups.append((group, [self._named[name] for name in names]))
                continue
            part = nn.Parameter(self._values[start:end])
            part.grad = self._grad[start:end]
            self.groups.append((group, [part]))
            self._flat |= dict.fromkeys(names, (part, start))

    def gradients(self) -> list[Tensor]:
        return [self._grad]

    def values(self) -> list[Tensor]:
        return [self._values]

    def zero(self) -> None:
        self._grad.zero_()

    def named(self, tensors: list[Tensor]) -> Parts:
        return {name: (0, tensors[0][span]) for name, span in self._spans.items()}

    def moments(self, optimizer: Optimizers) -> Parts:
        parts: Parts = {}
        for name, span in self._spans.items():
            parameter, start = self._flat.get(name, (self._named[name], span.start))
            own = slice(span.start - start, span.stop - start)
            for moment, tensor in optimizer.moments(parameter).items():
                parts[f"{moment}/{name}"] = 0, tensor.view(-1)[own]
        return parts


class ShardedParameters:
    """The model's own parameters, each spread over the workers (FSDP2)."""

    def __init__(self, model: nn.Module, group_of: GroupOf) -> None:
        self._named = dict(model.named_parameters())
        self.groups = [
            (group, [self._named[name] for name in names])
            for group, names in _by_group(self._named, group_of).items()
        ]

    def gradients(self) -> list[Tensor]:
        every = (p.grad for _, group in self.groups for p in group)
        return [grad.to_local() for grad in every if grad is not None]  # type: ignore[attr-defined]

    def values(self) -> list[Tensor]:
        return [local_part(p)[0] for p in self._named.values()]

    def zero(self) -> None:
        for parameter in self._named.values():
            parameter.grad = None

    def named(self, tensors: list[Tensor]) -> Parts:
        return {
            name: (local_part(parameter)[1], tensor.view(-1))
            for (name, parameter), tensor in zip(self._named.items(), tensors, strict=True)
        }

    def moments(self, optimizer: Optimizers) -> Parts:
        return {
            f"{moment}/{name}": (local_part(parameter)[1], local_part(tensor)[0].view(-1))
            for name, parameter in self._named.items()
            for moment, tensor in optimizer.moments(parameter).items()
        }


def _by_group(named: dict[str, nn.Parameter], group_of: GroupOf) -> dict[Group, list[str]]:
    """Names by group; groups that decay come first."""
    found: dict[Group, list[str]] = {}
    for name, parameter in named.items():
        found.setdefault(group_of(name, parameter), []).append(name)
    return dict(sorted(found.items(), key=lambda item: not item[0].weight_decay))


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


class AdamW:
    """`torch.optim.AdamW(fused=True)`, but for that class, which imports the compiler: 1.7 s of
    every process that trains. Moments are made here, `step` counts in float32."""

    def __init__(self, groups: list[dict[str, Any]], *, betas: tuple[float, float]) -> None:
        """`groups` have `params`, `weight_decay` and `eps`, and by the first step `lr`."""
        self.param_groups, self.betas = groups, betas
        self.state: dict[Tensor, dict[str, Tensor]] = {
            parameter: {
                "step": torch.zeros((), device=parameter.device),
                **{moment: torch.zeros_like(parameter.detach()) for moment in MOMENTS},
            }
            for group in groups
            for parameter in group["params"]
        }

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            members = [p for p in group["params"] if p.grad is not None]
            if not members:
                continue
            names = (*MOMENTS, "step")
            first, second, steps = ([self.state[p][name] for p in members] for name in names)
            torch._foreach_add_(steps, 1)
            torch._fused_adamw_(
                members, [p.grad for p in members], first, second, [], steps,
                lr=group["lr"], beta1=self.betas[0], beta2=self.betas[1],
                weight_decay=group["weight_decay"], eps=group["eps"],
                amsgrad=False, maximize=False,
            )  # fmt: skip


class Optimizers:
    """AdamW (Loshchilov & Hutter 2019), and Muon where the recipe has it, as one.

    Their moments are made here, not at the first step: what memory is left is known at once.
    """

    def __init__(
        self,
        parameters: Parameters,
        recipe: Recipe,
        batch_tokens: int,
        *,
        cuts: dict[Tensor, Sequence[int]] | None = None,
        muon_dtype: torch.dtype = torch.float32,
    ) -> None:
        """`cuts` are the widths of matrices side by side, as `Muon` takes them."""
        groups: dict[bool, list[dict[str, Any]]] = {False: [], True: []}
        for group, members in parameters.groups:
            settings = {"params": members, "weight_decay": group.weight_decay, "rate": group.rate}
            groups[group.muon].append(settings | ({} if group.muon else {"eps": group.eps}))
        beta2 = schedule.beta2(recipe, batch_tokens)
        self._adamw = AdamW(groups[False], betas=(recipe.beta1, beta2))
        self._all: list[AdamW | Muon] = [self._adamw]
        if groups[True]:
            self._all.append(
                Muon(groups[True], momentum=recipe.momentum, cuts=cuts or {}, dtype=muon_dtype)
            )

    def step(self, learning_rate: float) -> None:
        """One step at this learning rate, of which each group has its share."""
        for optimizer in self._all:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * group["rate"]
            optimizer.step()

    def moments(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Moments of one of the parameters, by their names."""
        found = next(o.state[parameter] for o in self._all if parameter in o.state)
        return {name: tensor for name, tensor in found.items() if name != "step"}

    def set_step(self, step: int) -> None:
        """Go on as after so many steps."""
        for state in self._adamw.state.values():
            state["step"].fill_(step)
