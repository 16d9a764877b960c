"""The Reward Forcing engine: a causal Wan student, its KV cache with the EMA-Sink, and the stream."""
