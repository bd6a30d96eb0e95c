#!/usr/bin/env bash
# Trains with mpirun: of MPICH (pip install -e '.[mpi]' brings it), Intel MPI or Open MPI.
#
#   launchers/mpi.sh [options of train.py]
#   PROCESSES=16 HOSTFILE=hosts launchers/mpi.sh                over ssh, or within a batch job
#
# Variables:
: "${DS_CONFIG:=}"                           # configuration; ds_configs/quickstart.json of the repository unless set
: "${PROCESSES:=2}"                          # all together, one a GPU
: "${HOSTFILE:=}"                            # in the form of your MPI; none: this machine, or what the batch system gives

set -euo pipefail
if [[ "${1:-}" == --help ]]; then
    sed -n '/^# Trains/,/^$/{s/^# \{0,1\}//;p;}' "$0"
    exit 0
fi

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." >/dev/null && pwd)"
# shellcheck disable=SC1091
source "$root/launchers/checks.bash"
[[ -z "$HOSTFILE" ]] || need_file HOSTFILE
need_count PROCESSES
cd "$root"
options=(-n "$PROCESSES")
if [[ -n "$HOSTFILE" ]]; then
    options+=(-hostfile "$HOSTFILE")
fi
exec mpirun "${options[@]}" python -u train.py --ds_config "$DS_CONFIG" "$@"
