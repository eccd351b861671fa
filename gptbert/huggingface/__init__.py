"""Code copied into exported folders for transformers' `trust_remote_code`; independent of this package."""
