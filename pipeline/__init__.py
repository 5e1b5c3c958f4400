"""How a Vision Transformer is trained: from WebDataset shards to checkpoints, on any number of ranks."""
