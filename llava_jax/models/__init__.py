"""Defines the models as functions from arrays to arrays: layers, decoder, tower, adapters."""
