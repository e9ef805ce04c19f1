"""Sets up processes and devices, and decides in which memory each array is stored."""
