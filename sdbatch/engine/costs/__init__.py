"""What was measured of jobs, and what follows from it for others: pure functions."""
