#!/usr/bin/env bash
# Trains several stages on one GPU: to try a configuration, a schedule or CUDA graphs before there are more GPUs.
# Its times say nothing of several GPUs: the processes take turns, and their messages go through the host.
#
#   launchers/one_gpu.sh [options of train.py]
#   PROCESSES=3 launchers/one_gpu.sh --set dsaux.pipeline.stages=3 --set dsaux.run.cuda_graphs=true
#
# Variables:
: "${DS_CONFIG:=}"                           # configuration; ds_configs/quickstart.json of the repository unless set
: "${PROCESSES:=2}"                          # a multiple of dsaux.pipeline.stages
: "${GPU:=0}"                                # which one
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
: "${OMP_NUM_THREADS:=$((($(nproc) + PROCESSES - 1) / PROCESSES))}"
export OMP_NUM_THREADS MASTER_PORT MASTER_ADDR=127.0.0.1 WORLD_SIZE="$PROCESSES" CUDA_VISIBLE_DEVICES="$GPU"
# NCCL refuses two ranks of one host on one GPU: each says that it is a host of its own, with one process.
export LOCAL_RANK=0 LOCAL_WORLD_SIZE=1 NCCL_SOCKET_IFNAME=lo NCCL_IB_DISABLE=1
pids=()
for ((rank = 0; rank < PROCESSES; rank++)); do
    RANK="$rank" NCCL_HOSTID="rank-$rank" python train.py --ds_config "$DS_CONFIG" "$@" &
    pids+=("$!")
done
# shellcheck disable=SC2329 # the traps call it
forward() { # a signal to this script goes to the ranks, and ends a wait for one
    signalled=true
    kill "-$1" "${pids[@]}" 2>/dev/null || true
}
trap 'forward TERM' INT TERM
trap 'forward USR1' USR1
code=0
for pid in "${pids[@]}"; do
    signalled=true
    while [[ "$signalled" == true ]]; do
        signalled=false ended=0
        wait "$pid" || ended=$?
    done
    if ((ended != 0 && code == 0)); then code="$ended"; fi
done
exit "$code"
