#!/usr/bin/env bash
# Starts a run on every worker of a Cloud TPU VM slice, and again after a failure that a restart mends.
#
#   bash experiments/launch/tpu_vm.sh --name=my-tpu --zone=us-central2-b [--project=P] [--dir=llm_jax]
#       [--python=.venv/bin/python] [--max_restarts=20] [--wait_s=30] [--dry_run] -- --gin_file=gin/runs/pretrain_8b.gin ...
#
# Each worker needs this repository and its environment in --dir (make BACKEND=tpu), relative to the home directory:
#   gcloud compute tpus tpu-vm ssh my-tpu --worker=all --command="git clone ... llm_jax && cd llm_jax && make venv BACKEND=tpu"
# The run directory belongs into a bucket. JAX finds the workers itself, from the slice's metadata.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/statuses.sh"

name= zone= project= dir=llm_jax python=.venv/bin/python max_restarts=20 wait_s=30 dry_run=
while [ $# -gt 0 ]; do
  case $1 in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --dir=*) dir=${1#*=} ;;
    --python=*) python=${1#*=} ;;
    --max_restarts=*) max_restarts=${1#*=} ;;
    --wait_s=*) wait_s=${1#*=} ;;
    --dry_run) dry_run=yes ;;
    --) shift; break ;;
    *) echo "error: unknown flag $1; see the head of $0" >&2; exit 2 ;;
  esac
  shift
done
[ -n "$name" ] && [ -n "$zone" ] || { echo "error: --name and --zone are needed" >&2; exit 2; }

# gcloud reports one status for all workers, so each leaves its own where it can be asked for afterwards.
remote="$(quoted cd "$dir") && { $(quoted env LLM_JAX_DISTRIBUTED=1 "$python" -m experiments.train "$@"); echo \$? > .train_status; }"
on_all=(gcloud compute tpus tpu-vm ssh "$name" "--zone=$zone" ${project:+"--project=$project"} --worker=all)
if [ -n "$dry_run" ]; then
  quoted "${on_all[@]}" "--command=$remote"
  echo
  exit
fi

attempt() {
  "${on_all[@]}" --command="$remote" || true
  mapfile -t statuses < <("${on_all[@]}" --command="$(quoted cat "$dir/.train_status")" 2> /dev/null | grep -E '^[0-9]+$' || true)
}
restarting "$max_restarts" "$wait_s" attempt
