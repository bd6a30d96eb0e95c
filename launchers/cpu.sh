#!/usr/bin/env bash
# Trains on the cores of this machine, without a GPU: one process a stage, joined by gloo.
#
#   launchers/cpu.sh [options of train.py]
#   PROCESSES=4 launchers/cpu.sh --set dsaux.pipeline.stages=4
#
# Variables:
: "${DS_CONFIG:=}"                           # configuration; ds_configs/quickstart.json of the repository unless set
: "${PROCESSES:=2}"                          # a multiple of dsaux.pipeline.stages
: "${MASTER_PORT:=29500}"                    # another one for a second run on this machine

set -euo pipefail
if [[ "${1:-}" == --help ]]; then
    sed -n '/^# Trains/,/^$/{s/^# \{0,1\}//;p;}' "$0"
    exit 0
fi

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." >/dev/null && pwd)"
# shellcheck disable=SC1091
source "$root/launchers/checks.bash"
need_count PROCESSES
need_count MASTER_PORT
cd "$root"
export DS_ACCELERATOR=cpu
exec deepspeed --num_gpus "$PROCESSES" --master_port "$MASTER_PORT" train.py --ds_config "$DS_CONFIG" "$@"
