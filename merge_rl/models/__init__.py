"""Networks and autoencoders: one file an external architecture, official parameter names."""
