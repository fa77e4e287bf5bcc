"""Interpolant, samplers, guidance and what a step draws; the names that flags choose from need no torch."""

PATH_TYPES = ("linear", "cosine")  # of the interpolant
WEIGHTINGS = ("uniform", "lognormal")  # of training times
MAX_SEED = 2**64 - 1  # of counted noise
