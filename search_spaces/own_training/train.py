"""A small training script: one process, or several under torchrun. It goes on from its folder.

python train.py --lr 0.01 --batch 16 --steps 100 --folder out
"""

import argparse
import json
import os
import signal
import sys
from pathlib import Path

import torch
from torch import distributed, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel


def main():
    given = argparse.ArgumentParser()
    given.add_argument("--lr", type=float, required=True)
    given.add_argument("--batch", type=int, required=True, help="sequences, all processes together")
    given.add_argument("--steps", type=int, required=True)
    given.add_argument("--seed", type=int, default=0)
    given.add_argument("--width", type=int, default=64)
    given.add_argument("--length", type=int, default=32)
    given.add_argument("--folder", type=Path, required=True)
    args = given.parse_args()

    several = "RANK" in os.environ  # torchrun says so
    if several:
        distributed.init_process_group("gloo")
    rank = distributed.get_rank() if several else 0
    world = distributed.get_world_size() if several else 1
    args.folder.mkdir(parents=True, exist_ok=True)
    checkpoint = args.folder / "last.pt"

    torch.manual_seed(args.seed)
    model = nn.Sequential(
        nn.Embedding(256, args.width),
        nn.Linear(args.width, 4 * args.width),
        nn.GELU(),
        nn.Linear(4 * args.width, args.width),
        nn.RMSNorm(args.width),
        nn.Linear(args.width, 256, bias=False),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.1)
    first = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]
    trained = DistributedDataParallel(model) if several else model

    def save(step):
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
        torch.save(state, checkpoint.with_suffix(".new"))
        checkpoint.with_suffix(".new").replace(checkpoint)  # whole, or not at all

    told = []
    signal.signal(signal.SIGTERM, lambda *_: told.append(1))  # raysweep, or torchrun, ends us

    data = torch.tensor(list(Path(argparse.__file__).read_bytes()))
    held_out, data = data[:10_000], data[10_000:]
    mine = args.batch // world
    for step in range(first, args.steps):
        draw = torch.Generator().manual_seed(args.seed + 1_000_003 * (step * world + rank))
        starts = torch.randint(len(data) - args.length - 1, (mine, 1), generator=draw)
        batch = data[starts + torch.arange(args.length + 1)]
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, 20 * (step + 1) / args.steps)
            group["lr"] *= 1 - 0.9 * step / args.steps
        loss = cross_entropy(trained(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if rank == 0 and (step % 20 == 0 or told):
            save(step + 1)
            tokens = (step + 1) * args.batch * args.length
            with open(args.folder / "progress.jsonl", "a") as progress:
                progress.write(json.dumps({"tokens": tokens, "loss": loss.item()}) + "\n")
        if told:
            sys.exit(1)

    if rank == 0:
        with torch.no_grad():
            logits = model(held_out[None, :-1])[0]
            result = {"val_loss": cross_entropy(logits, held_out[1:]).item(), "started_at": first}
        (args.folder / "metrics.json").write_text(json.dumps(result))
        print(result["val_loss"])
    if several:  # all end together: one that left first would break the others' connections
        del trained
        distributed.barrier()
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
