# What the exit statuses of `python -m experiments.train` mean to a launcher (docs/launching.md). Sourced by the scripts.

# is_final STATUS...: whether to leave it at that, given every process's status: 2 is an error that a person has to put
#   right, 130 is Ctrl-C. One of them is enough: the others end with 75 because they lost that process.
is_final() {
  local status
  for status in "$@"; do
    case $status in 2 | 130) return 0 ;; esac
  done
  return 1
}

# all_done STATUS...: whether every process completed the run.
all_done() {
  local status
  for status in "$@"; do
    [ "$status" = 0 ] || return 1
  done
}

# restarting MAX WAIT_S FUNCTION: calls FUNCTION, which sets the array `statuses` (none where it couldn't learn them), until
#   every process has completed (0), a person has to act (2), or it failed MAX + 1 times (75). Returns that status.
restarting() {
  local attempt
  for ((attempt = 0; attempt <= $1; attempt++)); do
    statuses=()
    "$3"
    echo "attempt $attempt: statuses ${statuses[*]-none}" >&2
    if [ ${#statuses[@]} -gt 0 ]; then
      if all_done "${statuses[@]}"; then return 0; fi
      if is_final "${statuses[@]}"; then return 2; fi
    fi
    if ((attempt < $1)); then sleep "$2"; fi
  done
  echo "error: it failed $(($1 + 1)) times" >&2
  return 75
}

# quoted WORD...: the words as a shell reads them back.
quoted() {
  local words
  printf -v words '%q ' "$@"
  printf '%s' "${words% }"
}
