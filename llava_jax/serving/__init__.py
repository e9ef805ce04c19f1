"""Serves a model by OpenAI's API and as a web page; needs the packages of the extra `serve`."""
