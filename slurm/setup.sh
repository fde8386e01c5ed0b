#!/bin/bash
# Sets qlora_dist up on a Slurm cluster, once, and prints the command that uses it. On a login node:
#
#   bash slurm/setup.sh /shared/me [partition]
#
# The folder is one that all nodes see. A virtual environment is made in it, unless there is one. Then a job of a few
# seconds says whether the nodes of the partition (the site's default, unless it is named) see it, with what GPUs.
# MODULES="cuda/12.8 python/3.11" loads modules before; PYTHON=python3.12 takes another Python; SRUN="--account=law"
# adds options of srun.
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2,/^set/p' "$0" | sed '$d; s/^# \{0,1\}//'; exit 2; }
folder=$(realpath -m "$1") partition=${2:-} checkout=$(cd "$(dirname "$0")/.." && pwd)
for tool in sinfo srun sbatch; do
    command -v $tool >/dev/null || { echo "$tool is not on PATH: run this on a login node of the cluster"; exit 1; }
done
state=$(sinfo --noheader --format=%a ${partition:+--partition="$partition"} | sort -u)
if [[ $state != *up* ]]; then
    echo "partition ${partition:-(the default one)} is ${state:-not there}; name one that is up: bash $0 $1 PARTITION"
    sinfo --noheader --format='  %R %a, %D nodes, %G'
    exit 1
fi
for module in ${MODULES:-}; do module load "$module"; done

venv=$folder/qlora_dist-venv
if [ ! -x "$venv/bin/python" ]; then
    mkdir -p "$folder"
    "${PYTHON:-python3}" -m venv "$venv"
    "$venv/bin/pip" install --quiet --upgrade pip
    "$venv/bin/pip" install --quiet -c "$checkout/constraints.txt" "$checkout"
fi

# shellcheck disable=SC2016
look='import importlib.util as u, os, socket
assert u.find_spec("qlora_dist"), "qlora_dist is not in this environment"
import torch
print(f"{socket.gethostname()}: {os.cpu_count()} cores, {torch.cuda.device_count()} GPUs, torch {torch.__version__}")'
gpus=$(sinfo --noheader --format='%P %G' | grep -E "^${partition:-[^ ]*\\*}\\*? " | grep -m1 -oE 'gpu[^(,]*' || true)
if ! srun --ntasks=1 --time=5 --immediate=120 ${partition:+--partition="$partition"} ${gpus:+--gres=gpu:1} \
    ${SRUN:-} "$venv/bin/python" -c "$look"; then
    echo "A node could not run $venv/bin/python: see above. Do all nodes see $folder? Is an account wanted (SRUN=--account=NAME)?"
    exit 1
fi
quoted=$(for module in ${MODULES:-}; do printf '%s,' "$module"; done)
echo "Set up. A first run, of a few minutes:"
echo "  cd $folder && $venv/bin/python -m qlora_dist.launch +experiment=legal launcher=slurm root=$folder/runs \\"
echo "    ${partition:+launcher.slurm.partition=$partition }launcher.slurm.gpus_per_rank=$([ -n "$gpus" ] && echo 1 || echo 0)" \
    "${quoted:+launcher.slurm.modules=[${quoted%,}] }launcher.slurm.time=1:00:00"
