#!/usr/bin/env bash
# Style and types; says everything that is wrong before it fails.
source "$(dirname "$0")/env.sh"
begun=$SECONDS
failed=0
ruff check . || failed=1
ruff format --check . || failed=1
mypy || failed=1
find csrc tests benchmarks \( -name '*.cu' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.h' \) \
    -exec clang-format --dry-run -Werror {} + || failed=1
scripts/note_seconds.sh check $((SECONDS - begun))
exit $failed
