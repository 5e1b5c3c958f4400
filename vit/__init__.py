"""A Vision Transformer from tensor math. Imports torch and the standard library only."""

from vit.model import ViT, ViTConfig

__all__ = ["ViT", "ViTConfig"]
