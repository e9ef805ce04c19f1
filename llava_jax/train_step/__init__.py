"""Builds the compiled step of training: loss, gradients, optimizer and update."""
