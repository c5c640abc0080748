"""What draws: one interface (``image_model``), latent diffusion and no network at all behind it."""
