"""Rewards of videos, and of latents through the decoder."""
