"""The special tokens of every tokenizer that is used here, and the ids of the first five."""

UNK_ID, BOS_ID, EOS_ID, PAD_ID, MASK_ID = range(5)
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>", "<mask>", *(f"<special_{i}>" for i in range(11)))
