"""What a run will hold, how to place it in what there is, and weights streamed from host memory."""
