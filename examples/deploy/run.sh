#!/usr/bin/env bash
# The runs and deployments of RESULTS.md, each a few minutes on two cores:
#
#   bash examples/deploy/run.sh MNIST CIFAR10
#
# MNIST holds torchvision's MNIST folder; CIFAR10 has folders of images, train/CLASS and test/CLASS, of 32 x 32 pixels
# (any will do for times). Runs and tables come to runs/deploy_*; a second call goes on, or prints what is done.
set -euo pipefail
mnist=${1:?"folder of torchvision's MNIST"}
cifar10=${2:?"folder with train/CLASS and test/CLASS of images"}

train() { # NAME FLAGS: one generation on labels, unless it is there
  local name=$1
  shift
  if [ -e "runs/$name/summary.json" ]; then return; fi
  python -m selfkd.generations --name "$name" --rounds 0 --trials 1 --seeds 0 --set tracking=none \
    --set train.channels_last=false --set train.fused=false "$@" # as the figures of RESULTS.md were computed
}
deploy() { # NAME FLAGS: one thread a process, so that two trials side by side do not wait for each other
  local name=$1
  shift
  OMP_NUM_THREADS=1 python -m selfkd.deploy --from "runs/$name" "$@"
}

train deploy_digits --labels 200 --set model.args.width=16
deploy deploy_digits --prune 0.5 --bits 4

train deploy_mnist --config tune_configs/mnist.yaml --data-root "$mnist" --labels 20000 --epochs 4
deploy deploy_mnist

train deploy_resnet20 --data folder --data-root "$cifar10" --model selfkd_resnet20 --set 'model.args={}' \
  --labels 2000 --epochs 3
deploy deploy_resnet20

train deploy_text --task text --set model.args.width=128 --set model.args.depth=4 --set model.args.heads=4 \
  --set train.steps=300
deploy deploy_text
