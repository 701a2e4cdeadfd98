#!/usr/bin/env bash
# Trains a small translator and scores it; takes the options of examples/quickstart.py.
source "$(dirname "$0")/env.sh"
exec python examples/quickstart.py "$@"
