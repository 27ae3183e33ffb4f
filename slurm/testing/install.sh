#!/usr/bin/env bash
# Install what the local test cluster needs, on Debian or Ubuntu as root. Does nothing the second time.
set -euo pipefail

packages=(slurm-wlm munge iproute2 slurmdbd mariadb-server-core mariadb-client-core libslurm-dev gcc libc6-dev)

missing=()
for package in "${packages[@]}"; do
    [[ $(dpkg-query --show --showformat='${db:Status-Status}' "$package" 2>/dev/null) == installed ]] ||
        missing+=("$package")
done
if ((${#missing[@]} == 0)); then
    echo "the local cluster's packages are installed"
    exit 0
fi
if [[ $(id --user) != 0 ]]; then
    echo "install.sh: must be run as root, to install: ${missing[*]}" >&2
    exit 1
fi
echo "installing: ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
apt-get update --quiet --quiet
apt-get install --quiet --quiet --yes --no-install-recommends "${missing[@]}" >/dev/null
