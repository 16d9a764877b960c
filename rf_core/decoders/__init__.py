"""Latents to images, as a stream: the Wan VAE, TAEHV, and handing images on beside the network."""
