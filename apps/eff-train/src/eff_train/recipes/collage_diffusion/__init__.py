"""Collage diffusion: an autoencoder, a text-to-picture transformer on its latents, and a judge of the pictures."""
