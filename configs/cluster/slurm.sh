#!/bin/sh
# Two machines with four ranks each under Slurm: `sbatch configs/cluster/slurm.sh`.
# Two minutes before its time is up the job's ranks get SIGUSR1, save after the same step and exit with 75; then the job goes back to the
# queue and goes on where it stood.
#SBATCH --job-name=ringtune
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append

ringrun --engine srun -n "$SLURM_NTASKS" --max-restarts 3 \
    ringtune sft --config_path config/sft_tiny.json --model_path base --dataset_paths data/sft/train.jsonl \
    --output_dir out --resume_from_checkpoint auto
code=$?
[ "$code" = 75 ] && scontrol requeue "$SLURM_JOB_ID"
exit "$code"
