"""Places work and arrays: environment, processes, devices, sharding and host memory."""
