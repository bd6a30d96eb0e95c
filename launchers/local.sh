#!/usr/bin/env bash
# Trains on the GPUs of this machine with DeepSpeed's launcher; with HOSTFILE on several machines, over ssh.
#
#   launchers/local.sh [options of train.py]
#   GPUS=4 launchers/local.sh --set dsaux.pipeline.stages=4
#   HOSTFILE=launchers/hostfile.example launchers/local.sh
#
# Variables:
: "${DS_CONFIG:=}"                           # configuration; ds_configs/quickstart.json of the repository unless set
: "${GPUS:=}"                                # processes, one a GPU; all GPUs unless set
: "${HOSTFILE:=}"                            # hosts and their GPUs; none: this machine alone
: "${MASTER_PORT:=29500}"                    # another one for a second run on this machine

set -euo pipefail
if [[ "${1:-}" == --help ]]; then
    sed -n '/^# Trains/,/^$/{s/^# \{0,1\}//;p;}' "$0"
    exit 0
fi

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." >/dev/null && pwd)"
# shellcheck disable=SC1091
source "$root/launchers/checks.bash"
[[ -z "$HOSTFILE" ]] || need_file HOSTFILE # DeepSpeed would warn, and train on this machine alone
[[ -z "$GPUS" ]] || need_count GPUS
need_count MASTER_PORT
cd "$root"
options=(--master_port "$MASTER_PORT")
if [[ -n "$HOSTFILE" ]]; then
    options+=(--hostfile "$HOSTFILE")
else
    if [[ -z "$GPUS" ]]; then
        GPUS="$({ nvidia-smi --list-gpus 2>/dev/null || true; } | wc -l)"
    fi
    if ((GPUS == 0)); then
        refuse "no GPU found. Use launchers/cpu.sh, or set GPUS."
    fi
    options+=(--num_gpus "$GPUS")
fi
exec deepspeed "${options[@]}" train.py --ds_config "$DS_CONFIG" "$@"
