"""What the package carries beside its code."""

from __future__ import annotations

from pathlib import Path

SHAPES = Path(__file__).resolve().parent / "shapes"
"""The folder of the embedded model, in diffusers' layout: a small latent diffusion model of coloured shapes.
Its README.md is the model card."""
