"""Turns data files into batches: records, conversations, images, order, packing and workers."""
