"""Counting a user's models: what a size function says, or the module that it builds.

`python -m raysweep.training.sizes` answers for `raysweep.study.own.count_models`.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from raysweep.errors import UserError
from raysweep.study.own import MARK, read_sizes
from raysweep.training.user_code import load_function, where


def count_module(module: Any, sequence_length: int) -> dict[str, float]:
    """Counts of a dense language model, a torch.nn.Module, for a sequence of so many tokens.

    Parameters are counted once each, however often they are used. Embedding are those of every
    nn.Embedding, and of the output head: the last nn.Linear as wide as the largest vocabulary.
    FLOPs are those that PyTorch's counter sees in one forward pass without data (fake tensors),
    times 3 for the backward pass; attention counts over the whole sequence. The module's weights
    are lost. Raises UserError where it cannot be run so.
    """
    import torch
    from torch import nn
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    tables = [m for m in module.modules() if isinstance(m, nn.Embedding)]
    if not tables:
        raise UserError("the module has no nn.Embedding: return a mapping of counts instead")
    vocabulary = max(m.num_embeddings for m in tables)
    heads = [
        m for m in module.modules() if isinstance(m, nn.Linear) and m.out_features == vocabulary
    ]
    outer = {id(p): p.numel() for m in (*tables, *heads[-1:]) for p in m.parameters()}
    total = sum(p.numel() for p in module.parameters())
    counter = FlopCounterMode(display=False)
    future = torch.__future__
    swaps = future.get_overwrite_module_params_on_conversion()
    future.set_overwrite_module_params_on_conversion(True)  # a meta parameter becomes a fake one
    try:
        # Of attention the counter knows the products, not every fused kernel.
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            module.to_empty(device="cpu")
            with counter, sdpa_kernel(SDPBackend.MATH):
                module(torch.zeros(1, sequence_length, dtype=torch.int64))
    except Exception as error:
        raise UserError(
            f"the module cannot be counted: {type(error).__name__}: {error}{where(error)}: return "
            "a mapping of counts instead"
        ) from error
    finally:
        future.set_overwrite_module_params_on_conversion(swaps)
    return {
        "params": total - sum(outer.values()),
        "params_embedding": sum(outer.values()),
        "flops_per_token": 3 * counter.get_total_flops() / sequence_length,
        "exact": 1.0,
    }


def counts(found: Any, settings: dict[str, Any], sequence_length: int) -> dict[str, float]:
    """What a size function's answer says. Raises UserError."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(found, torch.nn.Module):
        return read_sizes(found)
    if settings.get("experts", 1) > 1:
        raise UserError(
            "it returned a module, of which no one can tell the parameters that a token passes: of "
            "a mixture of experts return params_active, params_total and flops_per_token"
        )
    return count_module(found, sequence_length)


def _main() -> None:
    asked = json.load(sys.stdin)
    name, answer = asked["function"], {}
    try:
        function = load_function(name, asked["folder"], "training.size")
        models = []
        for settings in asked["settings"]:
            try:
                models.append(counts(function(settings), settings, asked["sequence_length"]))
            except UserError as error:
                raise UserError(f"training.size {name}: {error}") from None
            except Exception as error:
                raise UserError(
                    f"training.size {name} failed: {type(error).__name__}: {error}{where(error)}"
                ) from error
        answer = {"models": models}
    except UserError as error:
        answer = {"error": str(error)}
    print("\n" + MARK + json.dumps(answer))


if __name__ == "__main__":
    _main()
