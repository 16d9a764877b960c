"""The paper's ablations, repeated in the miniature world."""
