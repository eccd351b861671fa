"""Train a hybrid GPT-BERT: `torchrun --nproc_per_node=4 train_distributed.py …`, or without torchrun as one process."""

from gptbert.io.imports import explained, uncollected

with uncollected(), explained():
    from gptbert.train import main

if __name__ == "__main__":
    main()
