"""Masked-image-modelling pre-training of Mamba-based 3D backbones on CT volumes, in JAX and Flax."""

__version__ = "0.1.0"
