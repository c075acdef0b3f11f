#!/usr/bin/env bash
# SQuAD: fine-tune, prune, export.
#
#   bash scripts/run_squad.sh pretrain|prune|export [DEVICE] [options of cook/tasks.py]
#
# DEVICE: a GPU's number, several (0,1,2,3), or cpu. Multi-stage: sparsities="20 37 50 55 61" pruning_type=8 epochs=1.
set -euo pipefail
cd "$(dirname "$0")/.."

task_name=${task_name:-SQuAD1.1}     # or SQuAD2.0
data_dir=${data_dir:-data/squad}     # of scripts/download_squad_data.sh
model=${model:-bert-base-uncased}
pruning_type=${pruning_type:-5}
granularity=${granularity:-128}
sparsities=${sparsities:-50}
epochs=${epochs:-3}
train_batch_size=${train_batch_size:-16}
learning_rate=${learning_rate:-3e-5}
max_length=${max_length:-384}
doc_stride=${doc_stride:-128}
scoring_steps=${scoring_steps:-100}
variables=(task_name data_dir model pruning_type granularity sparsities epochs train_batch_size learning_rate max_length
  doc_stride scoring_steps)

# shellcheck source=scripts/task_launch.sh
. scripts/task_launch.sh
