"""What is optimised: rollouts, losses and weights, as functions of tensors and networks."""
