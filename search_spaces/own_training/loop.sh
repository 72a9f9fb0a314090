#!/usr/bin/env bash
# Trains the trials of ask_tell.yaml one after another. Start as many of these as you like, on any
# machine that reaches the results: ./loop.sh [RESULTS]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
results=${1:-results/ask_tell}

while trial=$(raysweep ask "$here/ask_tell.yaml" --results "$results" --shell --wait) && [ -n "$trial" ]; do
  eval "$trial"   # id, learning_rate, batch_sequences, steps, seed, width, ...
  out=$(mktemp -d)
  if loss=$(python "$here/train.py" --lr "$learning_rate" --batch "$batch_sequences" \
      --steps "$steps" --seed "$seed" --width "$width" --length "$sequence_length" \
      --folder "$out" | tail -n 1); then
    raysweep tell "$id" --results "$results" --loss "$loss"
  else
    raysweep tell "$id" --results "$results" --failed "train.py failed"
  fi
  rm -rf "$out"
done
