#!/usr/bin/env bash
# Trains with torchrun, on one host or, started on each, on several.
#
#   launchers/torchrun.sh [options of train.py]
#   NODES=2 MASTER_ADDR=node1 launchers/torchrun.sh             the same line on both hosts
#
# Variables:
: "${DS_CONFIG:=}"                           # configuration; ds_configs/quickstart.json of the repository unless set
: "${PROCESSES:=2}"                          # on each host, one a GPU
: "${NODES:=1}"                              # hosts
: "${MASTER_ADDR:=}"                         # with several hosts: one of them, the same on all
: "${MASTER_PORT:=29400}"                    # where the hosts meet
: "${RUN_ID:=dsaux}"                         # the same on all hosts, another one for each run

set -euo pipefail
if [[ "${1:-}" == --help ]]; then
    sed -n '/^# Trains/,/^$/{s/^# \{0,1\}//;p;}' "$0"
    exit 0
fi

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." >/dev/null && pwd)"
# shellcheck disable=SC1091
source "$root/launchers/checks.bash"
need_count PROCESSES
need_count NODES
need_count MASTER_PORT
cd "$root"
options=(--nproc_per_node "$PROCESSES")
if ((NODES > 1)); then
    if [[ -z "$MASTER_ADDR" ]]; then
        refuse "NODES is $NODES but MASTER_ADDR is not set. Set it to one of the hosts, the same on all."
    fi
    options+=(--nnodes "$NODES" --rdzv_backend c10d --rdzv_id "$RUN_ID" --rdzv_endpoint "$MASTER_ADDR:$MASTER_PORT")
else
    options+=(--standalone)
fi
exec torchrun "${options[@]}" train.py --ds_config "$DS_CONFIG" "$@"
