#!/usr/bin/env bash
# A GLUE task: fine-tune, prune, export.
#
#   bash scripts/run.sh pretrain|prune|export [DEVICE] [options of cook/tasks.py]
#
# DEVICE: a GPU's number, several (0,1,2,3), or cpu. Every variable below can be set in the environment
# (task_name=MRPC bash scripts/run.sh prune 0) or as an option (bash scripts/run.sh prune 0 --task_name MRPC).
set -euo pipefail
cd "$(dirname "$0")/.."

task_name=${task_name:-SST-2}        # CoLA SST-2 MRPC STS-B QQP MNLI QNLI RTE WNLI
data_dir=${data_dir:-data/glue}      # of scripts/download_glue_data.py
model=${model:-bert-base-uncased}    # a Hugging Face folder or Hub name, or Google's folder with bert_model.ckpt.*
pruning_type=${pruning_type:-5}      # 0 to 8, or a name; see the README's table
granularity=${granularity:-128}
sparsities=${sparsities:-50}         # percent; several make a stage each
epochs=${epochs:-3}
train_batch_size=${train_batch_size:-16}
learning_rate=${learning_rate:-2e-5}
max_length=${max_length:-128}
scoring_steps=${scoring_steps:-100}
variables=(task_name data_dir model pruning_type granularity sparsities epochs train_batch_size learning_rate max_length
  scoring_steps)

# shellcheck source=scripts/task_launch.sh
. scripts/task_launch.sh
