#!/usr/bin/env bash
# Runs a job on this machine under torchrun, and starts it again where that helps.
#
#   torchrun.sh JOB [--set section.field=value ...] [--debug]
#
# Environment, all optional:
#   NPROC           ranks on this machine (all its GPUs; 1 without any)
#   NNODES          machines of the job (1); with more, start this script on each of them
#   NODE_RANK       number of this machine, from 0; number 0 holds the rendezvous
#   RDZV_ENDPOINT   host:port of machine 0
#   RDZV_ID         a name that the machines of this job share, and no other job
#   LOCAL_ADDR      address at which the others reach this machine (its host name)
#   RESTARTS        starts in a row without a new finished layer before it gives up (5)
#   JOIN_SECONDS    how long a start waits for all machines (120)
#   GRACE_SECONDS   how long ranks have to save when they are stopped (60)
#   PYTHON          the interpreter (python)
#
# SIGTERM, SIGUSR2 and Ctrl-C stop the job at its next step; it saves and is not started again.
# Exit code: 0 done, 75 not done, start it again; 64, 65, 70, 73: starting it again does not help.
set -uo pipefail

PYTHON=${PYTHON:-python}
NNODES=${NNODES:-1}
# Indexed Jobs of Kubernetes and steps of Slurm number their machines.
NODE_RANK=${NODE_RANK:-${JOB_COMPLETION_INDEX:-${SLURM_NODEID:-}}}
RESTARTS=${RESTARTS:-5}
JOIN_SECONDS=${JOIN_SECONDS:-120}
GRACE_SECONDS=${GRACE_SECONDS:-60}
child=
stopped=
told=

if (($# == 0)) || [[ $1 == -h || $1 == --help ]]; then
  sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0"
  exit $(($# ? 0 : 64))
fi

# The restart of torchrun itself is not used (--max-restarts=0): it keeps the store of the failed attempt, where ranks
# then find old addresses. A new torchrun has a new store, so RDZV_ID may stay the same. The variable does the same for
# the store of the ranks.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# A rank that waits for a lost GPU peer ends (3), and leaves behind what each rank was doing.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-3}
export TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}
export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000}

scratch=$(mktemp -d) || exit 73
trap 'rm -rf "$scratch"' EXIT
# Ranks write their exit code there; torchrun itself ends with 1, whatever they said.
export ADAROUND_STATUS_FILE=$scratch/status.json

say() { echo "torchrun.sh: $*" >&2; }

# torchrun passes SIGTERM on to the ranks and kills those that are left after the grace period.
# shellcheck disable=SC2329 # the trap calls it
stop() {
  stopped=1
  if [[ -n $child ]]; then
    told=1
    kill -TERM "$child" 2>/dev/null
  fi
}
trap stop TERM USR2 INT HUP

# Runs a command to its end, also when signals cut the waiting short; its own process group, so that a terminal's Ctrl-C
# reaches it through stop() only.
run() {
  local code
  set -m
  "$@" </dev/null &
  child=$!
  set +m
  # A signal before the child had a number could not be passed on. Twice would be too often: a second signal means now.
  [[ -z $stopped || -n $told ]] || kill -TERM "$child"
  while wait "$child"; code=$?; kill -0 "$child" 2>/dev/null; do :; done
  child=
  return "$code"
}

attempt() {
  local options=(--nproc-per-node="$NPROC" --max-restarts=0 --shutdown-timeout="$GRACE_SECONDS" --log-dir="$scratch"
    --signals-to-handle="SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR2")
  if ((NNODES == 1)); then
    options+=(--standalone)
  else
    options+=(--nnodes="$NNODES" --rdzv-backend=c10d --rdzv-endpoint="$RDZV_ENDPOINT" --rdzv-id="${RDZV_ID:-adaround}"
      --rdzv-conf="join_timeout=$JOIN_SECONDS,is_host=$((NODE_RANK == 0))")
    [[ -z ${LOCAL_ADDR:-} ]] || options+=(--local-addr="$LOCAL_ADDR")
  fi
  rm -f "$ADAROUND_STATUS_FILE"
  run "$PYTHON" -m torch.distributed.run "${options[@]}" -m distributed_adaround run "$@"
}

# What the job says of itself, as one line in a file; its exit code.
job_status() {
  "$PYTHON" -m distributed_adaround status "$@" >"$scratch/status" 2>/dev/null
}

# What the ranks of this machine said. Where they only lost others, or could say nothing (killed, never started), the job's
# own record counts, unless it was there before or cannot be read.
exit_code() {
  local said=75 job line
  if [[ -s $ADAROUND_STATUS_FILE ]]; then
    said=$("$PYTHON" -c 'import json, sys; print(json.load(open(sys.argv[1]))["exit_code"])' "$ADAROUND_STATUS_FILE")
  fi
  job_status "$@"
  job=$?
  line=$(<"$scratch/status")
  if [[ $said == 75 ]] && [[ $job == 0 || ( -n $line && $line != "$before" ) ]]; then
    said=$job
  fi
  echo "$said"
}

check_number() { # name, least value
  [[ ${!1} =~ ^(0|[1-9][0-9]{0,5})$ ]] && ((${!1} >= $2)) && return
  say "$1=${!1}: must be a whole number, $2 or more; correct it"
  exit 64
}

check_number NNODES 1
check_number RESTARTS 0
check_number JOIN_SECONDS 1
check_number GRACE_SECONDS 1
if ((NNODES > 1)); then
  check_number NODE_RANK 0
  [[ ${RDZV_ENDPOINT:-} =~ ^[^[:space:]]+:[0-9]+$ ]] || {
    say "RDZV_ENDPOINT=${RDZV_ENDPOINT:-}: must be host:port of machine 0 when NNODES is more than 1"
    exit 64
  }
fi
"$PYTHON" -m distributed_adaround validate "$@" >/dev/null || exit
[[ -n ${NPROC:-} ]] || NPROC=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count() or 1)') || exit 70
check_number NPROC 1

job_status "$@"
before=$(<"$scratch/status")
failures=0
progress=
while [[ -z $stopped ]]; do
  attempt "$@" && exit 0
  code=$(exit_code "$@")
  case $code in
    0 | 64 | 65 | 70 | 73 | 130) exit "$code" ;;
  esac
  [[ -z $stopped ]] || break
  # Only finished layers count: the rest of the line differs from failure to failure.
  layers=$(grep -oE '[0-9]+ of [0-9]+ layers' "$scratch/status")
  if [[ $layers != "$progress" ]]; then
    progress=$layers
    failures=0
  fi
  if ((++failures > RESTARTS)); then
    say "no new layer in $failures starts; giving up. Start the job again to go on."
    exit 75
  fi
  say "the job ended before it was done; it starts again in $failures s ($failures of $RESTARTS without a new layer)"
  run sleep "$failures"
done
exit 75
