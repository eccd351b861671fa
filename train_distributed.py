"""Train a hybrid GPT-BERT: `torchrun --nproc_per_node=4 train_distributed.py …`, or without torchrun as one process."""

from gptbert.command_line import run_command
from gptbert.config import TrainConfig
from gptbert.fit import fit

if __name__ == "__main__":
    run_command(TrainConfig, fit)
