#!/usr/bin/env bash
# Starts a run on several machines over ssh, one process each, and starts it again after a failure that a restart mends.
#
#   bash experiments/launch/ssh.sh --hosts=a,b,c [--dir=DIR] [--python=.venv/bin/python] [--port=8476]
#       [--max_restarts=20] [--wait_s=10] [--dry_run] -- --gin_file=gin/runs/pretrain_8b.gin --gin.RUN_DIR="'/shared/runs/8b'" ...
#
# What follows -- goes to experiments.train as it is. Every host needs this repository and its environment in the same
# folder (--dir, by default this one), logins without a password, and the run directory on a shared disk or in a bucket.
# The first host is the coordinator; the others reach it at --port.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/statuses.sh"

hosts= dir=$(cd "$here/../.." && pwd) python=.venv/bin/python port=8476 max_restarts=20 wait_s=10 dry_run=
while [ $# -gt 0 ]; do
  case $1 in
    --hosts=*) hosts=${1#*=} ;;
    --dir=*) dir=${1#*=} ;;
    --python=*) python=${1#*=} ;;
    --port=*) port=${1#*=} ;;
    --max_restarts=*) max_restarts=${1#*=} ;;
    --wait_s=*) wait_s=${1#*=} ;;
    --dry_run) dry_run=yes ;;
    --) shift; break ;;
    *) echo "error: unknown flag $1; see the head of $0" >&2; exit 2 ;;
  esac
  shift
done
[ -n "$hosts" ] || { echo "error: --hosts=a,b,c is missing" >&2; exit 2; }
IFS=, read -ra names <<< "$hosts"

# The address by which the others reach the first, without a user's name before it.
coordinator=${names[0]#*@}:$port
command_of() {
  quoted cd "$dir"
  printf ' && exec env '
  quoted "JAX_COORDINATOR_ADDRESS=$coordinator" "JAX_NUM_PROCESSES=${#names[@]}" "JAX_PROCESS_ID=$1" \
    "$python" -m experiments.train "${@:2}"
}

if [ -n "$dry_run" ]; then
  for i in "${!names[@]}"; do
    quoted ssh -tt "${names[$i]}" "$(command_of "$i" "$@")"
    echo
  done
  exit
fi

pids=()
stop() { # -tt: the command at the other end gets a hang-up, and then ends, when its ssh does
  [ ${#pids[@]} -eq 0 ] || kill "${pids[@]}" 2> /dev/null || true
}
trap 'stop; exit 130' INT
trap 'stop; exit 143' TERM
run=("$@")
attempt() {
  pids=()
  for i in "${!names[@]}"; do
    ssh -tt "${names[$i]}" "$(command_of "$i" "${run[@]}")" < /dev/null > >(sed -u "s/^/[${names[$i]}] /") 2>&1 &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do
    status=0
    wait "$pid" || status=$?
    statuses+=("$status")
  done
}
restarting "$max_restarts" "$wait_s" attempt
