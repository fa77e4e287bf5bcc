"""What a run survives: kills at chosen and random points, full and read-only disks, damaged files, two writers at once.

``python -m tests.faults`` imports everything once and forks a process for each trial, so that hundreds take minutes.
"""
