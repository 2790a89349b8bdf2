#!/bin/sh
# A job file runs under torchrun.sh, on all GPUs and with restarts; any other command of the program runs as it is.
case ${1-} in
  run)
    shift
    exec python -m distributed_adaround launch torchrun "$@"
    ;;
  *.yaml | *.yml | *.json | *.toml)
    exec python -m distributed_adaround launch torchrun "$@"
    ;;
  *)
    exec python -m distributed_adaround "$@"
    ;;
esac
