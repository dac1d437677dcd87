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

# quoted WORD...: the words as a shell reads them back.
quoted() {
  local words
  printf -v words '%q ' "$@"
  printf '%s' "${words% }"
}
