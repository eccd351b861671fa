"""What an exported folder carries: code for transformers' `trust_remote_code`, apart from this package."""
