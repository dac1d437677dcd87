#!/bin/sh
# Makes the Python environment and installs what is asked for, once: tools/venv.sh GROUP, GROUP being run, dev, ops or parity.
#
# From the environment: VENV (folder), PYTHON (interpreter), BACKEND (cpu, tpu or cuda; what is installed stays if empty).
# What was installed is written down in VENV only after it succeeded, with checksums of the requirement files: an
# interrupted install starts again, a changed file installs again, and otherwise nothing is done.
set -eu
cd "$(dirname "$0")/.."

group=${1:-run}
VENV=${VENV:-.venv}
stamp="$VENV/.llm_jax-$group"
say() { printf '%s\n' "$*"; }
die() { say "error: $*" >&2; exit 1; }

case ${BACKEND:=$(cat "$VENV/.llm_jax-backend" 2>/dev/null || echo cpu)} in
  cpu) extra= ;;
  tpu) extra='jax[tpu]' ;;
  cuda) extra='jax[cuda13]' ;;
  *) die "BACKEND=$BACKEND is not one of cpu, tpu, cuda" ;;
esac
case $group in
  run) files=requirements.txt ;;
  dev) files='requirements.txt requirements-dev.txt' ;;
  ops) files='requirements.txt requirements-dev.txt requirements-ops.txt' ;;
  parity) files='requirements.txt requirements-dev.txt requirements-parity.txt' ;;
  *) die "$group is not one of run, dev, ops, parity" ;;
esac
wanted="$BACKEND $(cat $files | cksum)"

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

if [ -x "$VENV/bin/python" ] && new_enough "$VENV/bin/python"; then
  [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && exit 0
fi

# The environment itself. A folder left half made by an interrupted run, or whose Python is gone, is made anew.
has_pip() { "$VENV/bin/python" -m pip --version >/dev/null 2>&1; }
has_uv() { command -v uv >/dev/null 2>&1; }
if ! { [ -x "$VENV/bin/python" ] && new_enough "$VENV/bin/python" && { has_pip || has_uv; }; }; then
  if [ -e "$VENV" ] && [ ! -e "$VENV/pyvenv.cfg" ] && [ -n "$(ls -A "$VENV")" ]; then
    die "$VENV exists and is not a Python environment: move it away or give VENV=another-folder"
  fi
  if [ -z "${PYTHON:-}" ]; then
    for PYTHON in python3 python3.14 python3.13 python3.12 python3.11; do
      new_enough "$PYTHON" && break
    done
    new_enough "$PYTHON" || PYTHON=python3
  fi
  command -v "$PYTHON" >/dev/null 2>&1 || die "there is no $PYTHON: install Python 3.11 or newer, or give PYTHON=path"
  new_enough "$PYTHON" ||
    die "$PYTHON is $("$PYTHON" --version 2>&1), and 3.11 or newer is needed: install one, or give PYTHON=path"
  say "making $VENV with $("$PYTHON" --version 2>&1)"
  rm -rf "$VENV"
  if ! reason=$("$PYTHON" -m venv "$VENV" 2>&1) || ! has_pip; then
    rm -rf "$VENV"
    if has_uv; then
      say "python -m venv cannot make an environment here; using uv"
      uv venv --quiet --python "$PYTHON" "$VENV" || die "uv could not make $VENV"
    else
      [ -z "$reason" ] || say "$reason" | head -n 3 >&2
      die "$PYTHON -m venv cannot make an environment (ensurepip is missing?). Either 'apt install python3-venv'" \
        "(on Debian and Ubuntu), or install uv (docs.astral.sh/uv), and run the same command again"
    fi
  fi
fi

start=$(date +%s)
say "installing $files${extra:+ and $extra} into $VENV (cpu: a minute or two; tpu and cuda: a few more)"
rm -f "$VENV"/.llm_jax-*
set --
for file in $files; do set -- "$@" -r "$file"; done
[ -z "$extra" ] || set -- "$@" "$extra"
if has_pip; then
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
else
  uv pip install --quiet --python "$VENV/bin/python" "$@"
fi || die "the install did not finish (see above); the same command starts it again"
say "$BACKEND" > "$VENV/.llm_jax-backend"
[ "$group" = run ] || say "$BACKEND $(cat requirements.txt | cksum)" > "$VENV/.llm_jax-run"
[ "$group" != ops ] || say "$BACKEND $(cat requirements.txt requirements-dev.txt | cksum)" > "$VENV/.llm_jax-dev"
say "$wanted" > "$stamp.new" && mv "$stamp.new" "$stamp"
say "installed in $(($(date +%s) - start)) s"
