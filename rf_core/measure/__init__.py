"""What a run costs and whether it is right: benchmark, profile, counts, parity with golden data."""
