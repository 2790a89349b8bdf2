"""A small language model from its directory and plain text: perplexity before and after."""
