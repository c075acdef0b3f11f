# Sourced by run.sh, continued_run.sh and run_squad.sh: starts cook/tasks.py on the device with their variables.
# One process per GPU, or one on a CPU. NUM_PROCESSES overrides this, and LAUNCHER replaces the launcher (on a cluster).
# shellcheck shell=bash disable=SC2154

case ${1:-} in
  pretrain | prune | export) ;;
  *)
    echo "error: $0 ${1:-}: the first argument must be pretrain, prune or export" >&2
    exit 2
    ;;
esac
mode=$1 device=0
shift
if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then
  device=$1
  shift
fi
# shellcheck source=scripts/setup.sh
. scripts/setup.sh

options=()
for name in "${variables[@]}"; do
  case " $* " in
    *" --$name "* | *" --$name="*) ;; # an option of the user's comes before the variable
    *) options+=("--$name=${!name}") ;;
  esac
done

[ "$device" = cpu ] && export CUDA_VISIBLE_DEVICES=
[ "$device" != cpu ] && export CUDA_VISIBLE_DEVICES="$device"
gpus=$("$PYTHON" -c 'from cook.base.device import accelerators; print(accelerators())')
if [ "$gpus" -eq 0 ]; then
  [ "$device" = cpu ] || echo "there is no GPU $device here: running on the CPU" >&2
  export DS_ACCELERATOR=cpu
fi
processes=${NUM_PROCESSES:-$((gpus > 0 ? gpus : 1))}
export TOKENIZERS_PARALLELISM=false
if [ -z "${LAUNCHER:-}" ] && { [ "$processes" -eq 1 ] || [ "$mode" = export ]; }; then
  exec "$PYTHON" cook/tasks.py "$mode" "${options[@]}" "$@"
fi
here="$PYTHON -m torch.distributed.run --standalone --nproc_per_node $processes"
exec ${LAUNCHER:-$here} \
  cook/tasks.py "$mode" "${options[@]}" "$@"
