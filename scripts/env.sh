# Sourced by the scripts that run something: enters the repository's root, sets up, and puts .venv first on the path.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh
export PATH="$PWD/.venv/bin:$PATH"
# A waiting torch thread spins by default, which beside any busy process makes two threads 5-10 times slower.
export OMP_WAIT_POLICY=PASSIVE
