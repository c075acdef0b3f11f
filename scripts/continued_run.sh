#!/usr/bin/env bash
# Multi-stage pruning on a GLUE task: each stage starts from the weights and masks of the one before it.
#
#   bash scripts/continued_run.sh prune|export [DEVICE] [options of cook/tasks.py]
#
# Fine-tune the dense model first: bash scripts/run.sh pretrain DEVICE. Variables as in scripts/run.sh.
set -euo pipefail
cd "$(dirname "$0")/.."

task_name=${task_name:-SST-2}
data_dir=${data_dir:-data/glue}
model=${model:-bert-base-uncased}
pruning_type=${pruning_type:-8}
granularity=${granularity:-128}
sparsities=${sparsities:-25 35 50 55 60 65 70 75 80 85 90 95}
epochs=${epochs:-1} # of each stage
train_batch_size=${train_batch_size:-32}
learning_rate=${learning_rate:-2e-5}
max_length=${max_length:-128}
scoring_steps=${scoring_steps:-100}
variables=(task_name data_dir model pruning_type granularity sparsities epochs train_batch_size learning_rate max_length
  scoring_steps)

# shellcheck source=scripts/task_launch.sh
. scripts/task_launch.sh
