"""How good the sparse attention of a checkpoint is, measured: perplexity, recall, needles."""
