"""What commands have in common: command line, processes, log, checkpoints, atomic files, experiments."""

# Of networks that are built to be measured, without data:
NUM_CLASSES = 1000  # ImageNet's
DEFAULT_VAE = "f16d32"
