"""What runs finished networks over a set: latent caching, sampling. The names that flags choose from need no torch."""

MODES = ("sde", "ode", "map")
LABEL_SAMPLINGS = ("random", "equal")
ROUNDINGS = ("round", "truncate")
PATH_DROP = "path-drop"  # --guide: by the network's own first and last blocks
INTERNAL = "internal"  # --guide: by the network's own output on the way
OWN_GUIDES = (PATH_DROP, INTERNAL)
