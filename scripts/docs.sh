#!/usr/bin/env bash
# Builds the site of docs/ into site/; a broken link or an unknown name is an error. ARGS="serve" shows it while it is
# written.
source "$(dirname "$0")/env.sh"
export NO_MKDOCS_2_WARNING=1
python -m pip --disable-pip-version-check install --quiet -r requirements-docs.txt
if [ $# -eq 0 ]; then set -- build --strict; fi
python -m mkdocs "$@"
