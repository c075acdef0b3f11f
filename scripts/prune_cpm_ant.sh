#!/usr/bin/env bash
# The whole recipe: pretrain, learn layer, head and dim masks with a finetuning after each, reshape, report.
#
#   bash scripts/prune_cpm_ant.sh [CONFIG] [options of cook/train.py, such as --set seed=1]
#
# Without CONFIG: config/bmcook.json, which needs no data and no download. If it is started again, it skips finished
# stages and resumes the others from their last checkpoint. It starts one process per GPU, or one on a CPU.
# NUM_PROCESSES overrides this. LAUNCHER replaces the launcher (on a cluster: LAUNCHER="deepspeed --hostfile hosts").
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/setup.sh
. scripts/setup.sh

config=config/bmcook.json
if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then
  config=$1
  shift
fi
settings=() # of all options, those that the later steps need too
previous=
for option in "$@"; do
  [ "$previous" = --set ] && settings+=(--set "$option")
  case $option in
    --set=*) settings+=("$option") ;;
    --config | --config=* | --stage | --stage=*)
      echo "error: $option: name the config first, as in $0 CONFIG; the stages are all that it lists" >&2
      exit 2
      ;;
  esac
  previous=$option
done

# Runs a command in its own process group, and forwards signals to the whole group. Without this, bash and `deepspeed`
# would end at SIGTERM and leave the ranks behind. SIGUSR1 (save and continue) is for the ranks and must not end the
# launchers.
in_group() {
  local code=0 status caught=''
  set -m
  (trap '' USR1 && exec "$@") &
  group=$!
  set +m
  trap 'told=1 caught=1; kill -TERM -- "-$group" 2>/dev/null' TERM INT
  trap 'caught=1; kill -USR1 -- "-$group" 2>/dev/null' USR1
  wait "$group" || code=$?
  while [ -n "$caught" ]; do # a signal ends the wait, and not what is waited for
    caught='' status=0
    wait "$group" || status=$?
    [ "$status" -eq 127 ] || code=$status # 127: the wait before had its code already
  done
  trap - TERM INT USR1
  [ -z "${told:-}" ] || for _ in $(seq 300); do # ranks that are still saving
    kill -0 -- "-$group" 2>/dev/null || break
    sleep 0.2
  done
  return "$code"
}

gpus=$("$PYTHON" -c 'from cook.base.device import accelerators; print(accelerators())')
processes=${NUM_PROCESSES:-$((gpus > 0 ? gpus : 1))}
[ "$gpus" -gt 0 ] || export DS_ACCELERATOR=cpu
# WORLD_SIZE gives the plan the number of ranks. With the user's own launcher, only that launcher knows the number.
[ -n "${LAUNCHER:-}" ] || plan_for=(env WORLD_SIZE="$processes")
${plan_for[@]+"${plan_for[@]}"} "$PYTHON" cook/train.py --config "$config" --stage all --dry-run ${settings[@]+"${settings[@]}"}
case " $* " in *" --dry-run "*) exit 0 ;; esac

export TOKENIZERS_PARALLELISM=false
if [ -z "${LAUNCHER:-}" ] && [ "$processes" -eq 1 ]; then
  in_group "$PYTHON" cook/train.py --config "$config" --stage all "$@"
else
  # deepspeed --num_gpus would drop CUDA_VISIBLE_DEVICES and take the first cards.
  here="$PYTHON -m torch.distributed.run --standalone --nproc_per_node $processes"
  [ -n "${CUDA_VISIBLE_DEVICES:-}" ] || here="deepspeed --num_gpus $processes"
  # shellcheck disable=SC2086  # the launcher's own options
  in_group ${LAUNCHER:-$here} cook/train.py --config "$config" --stage all "$@"
fi
"$PYTHON" do_prune.py --config "$config" --verify ${settings[@]+"${settings[@]}"}
"$PYTHON" -m cook report --config "$config" ${settings[@]+"${settings[@]}"}
