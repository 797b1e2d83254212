"""Running untrusted code apart from everything else."""
