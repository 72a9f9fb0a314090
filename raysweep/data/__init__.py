"""The corpus: sources to token shards, and batches drawn from them."""
