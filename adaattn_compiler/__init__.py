"""AdaAttn: an attention compiler as a torch.compile backend."""
