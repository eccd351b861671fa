#!/usr/bin/env bash
# One run over several hosts: start the same command on each, in a checkout of this repository, within a minute.
#
#     configs/runs/hosts.sh ADDRESS [further flags of train_distributed.py]
#
# ADDRESS is the first host's address as seen by the others; that host runs torchrun's rendezvous. --output_dir is a
# folder shared by all hosts. Further flags come last and override those below.
#
# If a process fails, torchrun restarts all processes on all hosts, up to MAX_RESTARTS times, and --resume auto resumes
# from the newest checkpoint. If a host fails, start this same command there again; torchrun waits ten minutes.
# If the first host fails, the rendezvous is lost: start the command again on all hosts.
#
# A disconnected host ends its processes after --timeout, but torchrun itself waits until the kernel gives up the
# connection to the first host: more than ten minutes by Linux's defaults, half a minute with net.ipv4.tcp_retries2 = 6.
set -euo pipefail

address=${1:?the address of the first host, as the other hosts reach it}
shift

# This host's own address on that network, and its interface: host names may resolve to a different network or loopback.
route=$(ip -o route get "$address")
own=$(sed 's/.* src \([^ ]*\).*/\1/' <<<"$route")
interface=$(ip -o address show to "$own" | awk '{ print $2; exit }')
export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$interface} GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$interface}
[[ $own == "$address" ]] && is_host=1 || is_host=0
# If torchrun shared its store with its processes, a host that rejoins would wait forever for the store's address.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# A save takes a while for large models: torchrun kills what has not ended after so many seconds (PyTorch 2.11: 30).
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-100}

# Slurm sends USR1 before the time limit (slurm.sh); the trainer then saves.
exec torchrun \
    --nnodes="${NNODES:-2}" \
    --nproc_per_node="${NPROC_PER_NODE:-gpu}" \
    --rdzv_backend=c10d \
    --rdzv_endpoint="$address:${PORT:-29500}" \
    --rdzv_id="${RUN_ID:-gptbert}" \
    --rdzv_conf="is_host=$is_host" \
    --local_addr="$own" \
    --max_restarts="${MAX_RESTARTS:-3}" \
    --signals_to_handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
    train_distributed.py \
    --train_path="../bin/train_tokenized.bin" \
    --valid_path="../bin/val_tokenized.bin" \
    --config_file="../configs/config.json" \
    --tokenizer_path="../tokenizers/tokenizer.json" \
    --output_dir="../checkpoints" \
    --name="Run Name" \
    --hybrid_numerator=1 \
    --hybrid_denominator=4 \
    --seq_length=128 \
    --local_batch_size=32 \
    --global_batch_size=128 \
    --learning_rate=1e-3 \
    --max_steps=40000 \
    --optimizer="lamb" \
    --weight_decay=0.1 \
    --warmup_proportion=0.016 \
    --cooldown_proportion=0.016 \
    --mask_p_start=0.3 \
    --mask_p_end=0.15 \
    --mask_random_p=0.1 \
    --mask_keep_p=0.1 \
    --mixed_precision \
    --validate_every=1000 \
    --save_every=1000 \
    --seed=42 \
    --resume=auto \
    "$@"
