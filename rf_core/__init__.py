"""The Reward Forcing engine: a causal Wan student, its cache with the EMA-Sink, its stream."""
