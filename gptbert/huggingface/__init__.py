"""What exported folders hold beside weights and settings.

- `configuration_gptbert`, `layers_gptbert`, `heads_gptbert`, `pretrained_gptbert`, `modeling_gptbert`: code for
  transformers' `trust_remote_code`, copied into the folder and independent of this package.
- `tokenizer_files`: the tokenizer, as it is used here.
- `card.md.jinja`: the model card.
"""
