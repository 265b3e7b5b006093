"""What needs or is about GPUs: the timings beside cuDNN, and what the kernels compile to."""
