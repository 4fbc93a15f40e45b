"""What `python -m models.train` is made of: tasks, the loop, checkpoints, processes, pictures, the comparison."""
