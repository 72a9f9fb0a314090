"""A Llama of Hugging Face transformers in a plain PyTorch loop, as raysweep calls it."""

import functools
import math
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 256  # bytes


def build(settings, length=32):
    shape = {name: settings[name] for name in settings if name in LlamaConfig().to_dict()}
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            num_hidden_layers=1,
            max_position_embeddings=length,
            use_cache=False,
            **shape,
        )
    )


def size(settings):
    """The model of a scale, without memory: raysweep counts its parameters and FLOPs."""
    with torch.device("meta"):
        return build(settings)


@functools.cache  # workers train one trial after another
def text():
    """Bytes of this Python's sources: (to train on, held out)."""
    files = sorted(Path(functools.__file__).parent.glob("*.py"))
    data = torch.tensor(list(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8)
    return data[20_000:], data[:20_000]


def train(run):
    """Train one model; its mean loss over held-out text, in nats a token."""
    torch.manual_seed(run.seed)
    data, held_out = text()
    length = run.sequence_length
    model = build(run.settings, length)
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=(0.9, 0.95), weight_decay=run.settings["weight_decay"]
    )
    for step in range(run.steps):
        warm = min(1.0, (step + 1) / (0.05 * run.steps))
        rate = run.learning_rate * warm * (0.55 + 0.45 * math.cos(math.pi * step / run.steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        starts = torch.randint(len(data) - length - 1, (run.batch_sequences, 1))
        batch = data[starts + torch.arange(length + 1)].long()
        loss = losses(model, batch).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0:
            tokens = (step + 1) * run.batch_tokens
            run.report(tokens, loss.item(), learning_rate=rate, grad_norm=norm.item())

    model.eval()
    with torch.no_grad():
        starts = torch.arange(0, len(held_out) - length - 1, length)[:, None]
        each = losses(model, held_out[starts + torch.arange(length + 1)].long()).mean(1)
    return {"loss": each.mean().item(), "loss_se": each.std().item() / len(each) ** 0.5}


def losses(model, batch):
    """Of each token [sequences, length]."""
    logits = model(batch[:, :-1]).logits
    found = cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
    return found.view(len(batch), -1)
