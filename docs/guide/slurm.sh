#!/bin/bash
# Pretrains on several machines of a Slurm cluster:  sbatch slurm.sh clip_photos --data.batch-size 480
# Three minutes before the time of the job is over, the run saves its state, and the job goes back into the queue to continue.
# It does not go back if the run has finished or failed by then.
#SBATCH --job-name=fastvlp
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#SBATCH --signal=B:USR1@300
set -uo pipefail

recipe=${1:?name a recipe, and then its options}
shift
out=${OUT:-$PWD/runs/$recipe}
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
again=

# Slurm sends its signal to this script only. The script passes it on to the ranks as SIGTERM.
stop() {
    again=yes
    scancel --signal=TERM "$SLURM_JOB_ID.0"
}
trap stop USR1

# The output of the run. It distinguishes a run that stopped at the signal from one that failed: torchrun exits with 1 in both cases.
output=$(mktemp)
trap 'rm -f "$output"' EXIT

# One torchrun on each machine starts a process for each GPU. With `--resume` the run starts anew if there is no checkpoint yet.
srun --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_NNODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-8}" \
    --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$first:29500" \
    -m fastvlp pretrain "$recipe" --out "$out" --resume "$@" | tee "$output" &
wait %1
code=$?
if [ -n "$again" ]; then
    # The signal ended the first `wait`, but not the run.
    wait %1
    code=$?
    if [ "$code" -ne 0 ] && grep -q "and saved; the same command continues it" "$output"; then
        scontrol requeue "$SLURM_JOB_ID"
        exit 0
    fi
fi
exit "$code"
