#!/usr/bin/env bash
# One study on a Slurm cluster:  sbatch cluster/slurm.sh SPACE RESULTS. See README.md.
#SBATCH --job-name=raysweep
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --cpus-per-task=16
#SBATCH --gpus-per-node=4
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --output=raysweep-%j.log
# EDIT the sizes above, and add your --partition and --account. Nodes are not shared, since
# `ray symmetric-run` refuses one on which any other Ray runs.

set -euo pipefail

space=${1:?usage: sbatch cluster/slurm.sh SPACE RESULTS}
results=${2:?usage: sbatch cluster/slurm.sh SPACE RESULTS}  # a shared folder, s3:// or gs://
cd "${SLURM_SUBMIT_DIR:?submit this script with sbatch}"
# EDIT: how your environment is entered.
# shellcheck disable=SC1091
source .venv/bin/activate

# A token for this job alone, in a file that only you can read; srun passes the path on.
umask 077
token=$HOME/.raysweep-token-$SLURM_JOB_ID
python -c 'import secrets; print(secrets.token_hex(32))' >"$token"
trap 'rm -f "$token"' EXIT
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$token RAY_USAGE_STATS_ENABLED=0
unset RAY_ADDRESS RAY_AUTH_TOKEN

# Nodes of a large job start minutes apart; Ray would wait for 30 s.
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=600
export OMP_NUM_THREADS=1

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 10000))  # a port of its own, should a Ray of an earlier job linger

# One Ray over all nodes of the job, the study on its first, and Ray ended with the study. Since
# 22.05 srun does not know how many CPUs sbatch was asked for: one a task, unless it is told.
cpus=${SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE}
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
    --cpus-per-task="$cpus" \
    ray symmetric-run --address "$head:$port" --min-nodes "$SLURM_JOB_NUM_NODES" \
    --num-cpus "$cpus" --dashboard-host 127.0.0.1 --disable-usage-stats -- \
    python -m raysweep run "$space" --results "$results" --address auto
