#!/usr/bin/env bash
# Installs the Slurm that tests/slurm starts: Debian's or Ubuntu's packages, nothing is configured or enabled for good.
set -euo pipefail

if [[ "${1:-}" == --help ]]; then
    echo "usage: tests/slurm/install.sh    installs slurm-wlm and munge with apt-get; needs root and Debian or Ubuntu"
    exit 0
fi
missing=()
for program in munged slurmctld slurmd sbatch srun; do
    # Debian has the daemons in sbin, which is not in everybody's PATH.
    PATH="$PATH:/usr/sbin:/sbin" command -v "$program" >/dev/null || missing+=("$program")
done
if ((${#missing[@]} == 0)); then
    exit 0
fi
echo "installing slurm-wlm and munge for: ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
# Where there is no network this gives up soon.
options=(-o Acquire::http::Timeout=20 -o Acquire::https::Timeout=20 -o Acquire::Retries=1)
apt-get "${options[@]}" update --quiet --quiet
apt-get "${options[@]}" install --quiet --quiet --yes --no-install-recommends slurm-wlm munge
