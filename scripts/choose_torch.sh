#!/usr/bin/env bash
# Prints the pip arguments for a torch with kernels for every GPU of this machine, and the reason after a "#".
#
#   oldest GPU      driver    torch
#   below 7.5       any       2.7.1: the last on the default index with kernels for 6.0 ... 7.2. Python > 3.13 has no
#                             2.7.1, but the CUDA 12.6 index goes on up to 2.14
#   7.5 ... 9.0     < 580     2.13.0 built with CUDA 12.6: the default build (CUDA 13) needs driver 580
#   10.0 and newer  < 580     none: CUDA 12.6 has no kernels for them; that is an error which names the driver
#   7.5 and newer   >= 580    2.13.0
#   none                      2.13.0
#
# TORCH overrides, for example TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu" (a small download).
set -euo pipefail
cu126="--index-url https://download.pytorch.org/whl/cu126"

choose() {
    echo "$1  # $2"
    exit
}

if [[ -n "${TORCH:-}" ]]; then choose "$TORCH" "TORCH is set"; fi

# One "6.0, 535.104.05" per GPU. A failing nvidia-smi explains itself on stdout, hence its status counts.
gpus=$(nvidia-smi --query-gpu=compute_cap,driver_version --format=csv,noheader 2>/dev/null) || {
    nvidia-smi --list-gpus >/dev/null 2>&1 || choose torch==2.13.0 "no NVIDIA GPU found"
    echo "driver too old: its nvidia-smi names no compute capability; update it, or name a torch by TORCH" >&2
    exit 1
}
IFS=', ' read -r capability driver < <(sort -V <<<"$gpus")
[[ "$capability" =~ ^[0-9]+\.[0-9]$ && "$driver" =~ ^[0-9]+\. ]] ||
    choose torch==2.13.0 "nvidia-smi names no compute capability"

found="compute capability $capability, driver $driver"
if ((${capability/./} >= 75 && ${driver%%.*} >= 580)); then choose torch==2.13.0 "$found"; fi
newest=$(sort -rV <<<"$gpus" | head -n 1)
newest=${newest%%,*}
if ((${capability/./} >= 75 && ${newest/./} >= 100)); then
    echo "driver too old: compute capability $newest needs driver 580 or newer, found $driver; update the NVIDIA" \
        "driver, or name a torch by TORCH" >&2
    exit 1
fi
if ((${capability/./} >= 75)); then choose "torch==2.13.0 $cu126" "$found"; fi
if "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info >= (3, 14))'; then choose torch==2.7.1 "$found"; fi
choose "torch>=2.9,<2.15 $cu126" "$found, Python > 3.13"
