"""What to run on: QEMUs and kernels found, fetched and tried; what is lacking, and what mends it."""
