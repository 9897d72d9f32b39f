#!/usr/bin/env bash
# A run on GPUs under SLURM, one process a GPU; the same command continues it.
#
#     sbatch --nodes=2 --gpus-per-node=8 --ntasks-per-node=8 deploy/slurm.sh \
#       --config configs/qwen2_5_math_7b.py --config.policy.path=DIR --workdir /shared/runs/qwen --config.mesh.shape='(16,)'
#
# The work directory must be seen by all nodes. SLURM says USR1 here two minutes before the time is over and the processes get
# SIGTERM: they save and end with 75, and the job queues itself again.
#SBATCH --job-name=krl
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail

cd "${SLURM_SUBMIT_DIR:?is set by sbatch}" || exit 1
srun --kill-on-bad-exit=0 .venv/bin/python train.py "$@" &
step=$!
trap 'scancel --signal=TERM "$SLURM_JOB_ID"' USR1
wait "$step"
code=$?
while kill -0 "$step" 2>/dev/null; do # a signal ends `wait`, not the step
  wait "$step"
  code=$?
done
if [ "$code" -eq 75 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
