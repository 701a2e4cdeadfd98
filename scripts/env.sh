# Sourced by the scripts that run something: enters the repository's root, sets up, and puts the virtual environment
# first on the path: .venv, or the one that FASTATTN_VENV names.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export FASTATTN_VENV=${FASTATTN_VENV:-.venv}
scripts/setup.sh
export PATH="$PWD/$FASTATTN_VENV/bin:$PATH"
# A waiting torch thread spins by default, which beside any busy process makes two threads 5-10 times slower.
export OMP_WAIT_POLICY=PASSIVE
