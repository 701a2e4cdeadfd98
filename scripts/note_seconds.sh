#!/usr/bin/env bash
# note_seconds.sh STEP SECONDS: for the table that scripts/test.sh ends with, what a step took when it last ran.
set -euo pipefail
notes="$(dirname "$0")/../${FASTATTN_VENV:-.venv}/seconds"
others=$(grep --no-messages --invert-match "^$1 " "$notes" || true)
printf '%s\n' ${others:+"$others"} "$1 $2" >"$notes"
