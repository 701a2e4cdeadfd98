#!/usr/bin/env bash
# Every step of examples/wmt14 on self-made text, with a kill in the middle of training; takes the smoke's options.
source "$(dirname "$0")/env.sh"
exec python -m examples.wmt14.smoke "$@"
