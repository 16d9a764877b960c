"""What samples are worth: the rewards, and the judge that shows them latents."""
