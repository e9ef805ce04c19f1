"""Serves a model through OpenAI's HTTP API and a web page (`pip install 'llava_jax[serve]'`)."""
