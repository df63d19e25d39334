"""What to run on: QEMUs and kernels found, fetched, tried; what is lacking, and what mends it."""
