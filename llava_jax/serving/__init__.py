"""Serving a model: OpenAI's API and a web page. What it needs is in the extra `serve`."""
