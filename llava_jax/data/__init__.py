"""Reads data files and turns their records into batches for training and evaluation."""
