#!/usr/bin/env bash
# From a fresh clone to a picture: makes .venv, installs localdit, and draws what the prompt says with LocalDiT-Mini.
#
# usage: ./quickstart.sh ["a prompt"]
# Needs Python 3.11 or newer. No GPU, no account, no model download.
set -euo pipefail
prompt=${1:-a red circle left of a blue square}
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

"$repo/.ci/install" "$repo/.venv"
picture=$("$repo/.venv/bin/python" -m localdit.cli generate "$prompt" --model mini --out "$repo/outputs")
echo
echo "\"$prompt\" is drawn in"
echo "    $picture"
echo "More of them:  \"$repo/.venv/bin/localdit\" generate \"$prompt\" --num 4"
