"""Training: the miniature world and, later, the distillation that makes Reward Forcing students."""
