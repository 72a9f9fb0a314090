"""A language model of this folder's own, as raysweep calls it: see own.yaml."""

import math

import torch
from torch import nn
from torch.nn.functional import cross_entropy


class Model(nn.Module):
    """A small decoder over bytes."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        block = nn.TransformerEncoderLayer(
            width, 4, 4 * width, 0.0, batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, 256, bias=False)

    def forward(self, tokens):
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], tokens.device)
        return self.head(self.blocks(self.embedding(tokens), mask=mask, is_causal=True))


def size(settings):
    """The model of a scale, on the meta device: raysweep counts it."""
    with torch.device("meta"):
        return Model(settings["width"], settings["layers"])


def text():
    """Bytes to train on: here this Python's own sources."""
    import argparse
    import inspect
    import typing

    found = "".join(inspect.getsource(m) for m in (argparse, inspect, typing))
    return torch.tensor(list(found.encode()))


def train(run):
    """Train one model; the mean loss over held-out sequences, in nats a token."""
    torch.manual_seed(run.seed)
    model = Model(run.settings["width"], run.settings["layers"])
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    data, length = text(), run.sequence_length
    held_out = data[: 64 * length + 1]
    data = data[64 * length + 1 :]

    for step in range(run.steps):
        done = step / run.steps
        warm = min(1.0, (step + 1) / (0.05 * run.steps))
        for group in optimizer.param_groups:
            group["lr"] = run.learning_rate * warm * (0.55 + 0.45 * math.cos(math.pi * done))
        starts = torch.randint(len(data) - length - 1, (run.batch_sequences,))
        batch = torch.stack([data[s : s + length + 1] for s in starts])
        loss = cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 10 == 0:
            run.report((step + 1) * run.batch_tokens, loss.item())

    model.eval()
    with torch.no_grad():
        inputs, targets = held_out[:-1].view(-1, length), held_out[1:].view(-1, length)
        return cross_entropy(model(inputs).flatten(0, 1), targets.flatten()).item()
